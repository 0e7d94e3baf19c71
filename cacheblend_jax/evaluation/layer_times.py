"""How long a model's layers take on this device, fitted to measured layer steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.delays import ComputeModel, layer_sizes
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.prompts import random_prompt
from cacheblend_jax.model import Model
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore


def fit_compute(
    model: Model,
    lengths: Sequence[int],
    ratios: Sequence[float],
    *,
    repeats: int = 3,
    progress: Progress = no_progress,
) -> tuple[ComputeModel, dict[str, Any]]:
    """Times every layer of streamed prefills and fits `ComputeModel` to them, by non-negative least squares.

    Args:
        lengths: of prompts, in tokens of chunks.
        ratios: recompute ratios; each runs at each length.
        repeats: runs of each; the medians count.

    Returns:
        The fitted model, and how well it fits: `layer_steps` (their number), `median_error` and `worst_error`
        (relative), and `layers` (each step's `sizes`, see `layer_sizes`, and `seconds`).
    """
    sizes: list[Sequence[float]] = []
    seconds: list[float] = []
    others: list[float] = []
    cases = [(tokens, ratio) for tokens in lengths for ratio in ratios]
    with ChunkStore(host_bytes=2**40) as store:
        for tokens, ratio in progress(cases, "layer steps"):
            prompt = random_prompt(model.config.vocab_size, tokens)
            with Engine(model, store, BlendConfig(ratio, "hkvd"), executor="streamed") as engine:
                engine.precompute(prompt)
                plan = engine.prefill(prompt).plan
                runs = [_timed_layers(engine, prompt) for _ in range(repeats)]
            sizes += layer_sizes(plan)
            seconds += np.median([layers for layers, _ in runs], axis=0).tolist()
            others += [other for _, other in runs]
            store.clear()
    design, target = np.asarray(sizes), np.asarray(seconds)
    # A compromise: absolute errors would count long layers only, relative ones mostly the jitter of short layers.
    weights = 1 / np.sqrt(target)
    coefficients, _ = nnls(design * weights[:, None], target * weights)
    errors = np.abs(design @ coefficients / target - 1)
    fit = {
        "layer_steps": len(target),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "layers": [{"sizes": list(x), "seconds": y} for x, y in zip(sizes, seconds, strict=True)],
    }
    layer, key, projected, attending, visible = coefficients.tolist()
    return ComputeModel(layer, key, projected, attending, visible, statistics.median(others)), fit


def _timed_layers(engine: Engine, prompt: Prompt) -> tuple[list[float], float]:
    """Seconds of each layer's step, and of the rest of the request."""
    trace = Trace()
    out = engine.prefill(prompt, trace=trace)
    steps = trace.lane("compute")
    layers = [step.ended - step.began for step in steps]
    return layers, max(out.stats.ttft_s - (steps[-1].ended - steps[0].began), 0.0)
