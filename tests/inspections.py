"""Inspections made up of numbers, of any size: what pictures and reports show does not depend on a model."""

from __future__ import annotations

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.results import GenerateStats, Generation, PrefillStats
from cacheblend_jax.evaluation.inspection import Inspection
from cacheblend_jax.evaluation.parts import consecutive_parts

CHECK_LAYER = 1


def made_inspection(
    chunk_lengths=(4, 6), names=None, *, layers: int = 6, words=("Oslo", " is", " home", "."), answer: str = "Oslo"
) -> Inspection:
    """An inspection of a prefix of 3 tokens, chunks, and a question of 2; some 15 % of the tokens are recomputed."""
    rng = np.random.default_rng(0)
    names = [f"notes.md {number}" for number in range(len(chunk_lengths))] if names is None else names
    parts = consecutive_parts(["prefix", *names, "question"], [3, *chunk_lengths, 2])
    tokens = parts[-1].stop
    candidate = np.zeros(tokens, bool)
    candidate[3:-2] = True
    chosen = rng.random(tokens) < 0.15
    last_layer = np.where(chosen, rng.integers(CHECK_LAYER + 1, layers, tokens), CHECK_LAYER)
    last_layer[:3], last_layer[-2:] = -1, layers - 1  # the prefix is exact, the question forced
    recomputed = np.arange(layers)[:, None] <= last_layer
    deviation = (rng.random((layers, tokens)) ** 4 * candidate).astype(np.float32)
    deviation[0] = 0
    between = np.tril(rng.random((layers - 1, len(parts), len(parts)))) / len(parts)
    reuse = between.copy()
    reuse[:, 1:-1] = 0
    return Inspection(
        model="made",
        blend=BlendConfig(),
        check_layer=CHECK_LAYER,
        parts=parts,
        texts=tuple(words[number % len(words)] for number in range(tokens)),
        deviation=deviation,
        remaining=deviation / 2,
        candidate=candidate,
        recomputed=recomputed,
        attention={"full": between, "reuse": reuse, "blend": (between + reuse) / 2},
        attention_deviation={"reuse": np.linspace(0, 0.8, layers), "blend": np.linspace(0, 0.3, layers)},
        answers={mode: _answer(mode, answer, tokens) for mode in ("full", "prefix", "reuse", "blend")},
    )


def _answer(mode: str, text: str, tokens: int) -> Generation:
    candidates = 0 if mode in ("full", "prefix") else tokens - 5
    exact = 0 if mode == "full" else 3
    times = dict.fromkeys(("ttft_s", "host_s", "load_s", "compile_s"), 0.0)
    counts = {"hits": 0, "misses": 0, "exact": exact, "candidates": candidates}
    counts["forced"] = tokens - candidates - exact
    ratio = 0.15 if mode == "blend" else 0.0
    stats = PrefillStats(
        mode, tokens, **times, **counts, recompute_ratio=ratio, flops=100 * (tokens - candidates), peak_memory_bytes=0
    )
    return Generation(text, [7 if mode == "reuse" else 5], GenerateStats(stats, 0, 0.0, "stop"))
