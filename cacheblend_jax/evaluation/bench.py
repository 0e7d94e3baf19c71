"""`bench`: the modes timed against each other in one process, interleaved, on the same prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.prompts import CHUNKS, QUESTION_TOKENS, random_prompt
from cacheblend_jax.evaluation.torch_peer import check_peer, torch_prefill
from cacheblend_jax.model import Model
from cacheblend_jax.store import ChunkStore

PAUSE_S = 0.3  # before each run: a runtime's threads keep spinning for a while after their last work
STORE_BYTES = 64 * 2**30


@dataclass(frozen=True)
class BenchReport:
    """Timings of the modes.

    Attributes:
        device: its kind, as JAX names it.
        jax: JAX's version.
        rows: one for each length and mode: `tokens` (in chunks), `mode`, `ttft_s` (median) and `spread_s` (half the
            distance between the quartiles), `tokens_per_s`, `speed_up` (over full prefill), `ideal_speed_up` (by
            FLOPs), `efficiency` (the one over the other), `recompute_ratio`, `host_share` and `load_share` (of the
            TTFT), `flops`, `compile_s`, `peak_memory_bytes`, `programs` (compiled so far) and `compiles_after_warmup`.
            With torch as the peer, another row for each length, whose mode is `"torch full"`, with only its TTFT and
            spread; and `over_torch` in full prefill's.
    """

    device: str
    jax: str
    rows: list[dict[str, Any]]


def bench(
    model: Model,
    *,
    tokens: Sequence[int] = (4096,),
    chunks: int = CHUNKS,
    prefix_tokens: int = 0,
    question_tokens: int = QUESTION_TOKENS,
    ratios: Sequence[float] = (0.15,),
    selector: str = "query",
    repeats: int = 7,
    peer: Literal["torch"] | None = None,
    kv_dtype: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Times every mode, and `blend` at every ratio, on random prompts of every length.

    Args:
        tokens: lengths to time: tokens in chunks.
        chunks: equal parts that those are split into.
        prefix_tokens: before the chunks.
        question_tokens: after the chunks.
        repeats: rounds; each runs every mode once.
        peer: `"torch"`: also times full prefill by transformers and torch.
        kv_dtype: what the chunks' KV is quantised to, see `ChunkStore`.
        announce: called with a line of text before each step.

    Raises:
        CacheBlendError: a length or ratio out of range, an unknown selector, a prompt that does not fit the model, or
            torch is missing, or cannot run the model.
    """
    if peer is not None:
        check_peer(model)
    if not ratios:
        raise CacheBlendError("ratios must hold at least one recompute ratio, got none")
    configs = [BlendConfig(ratio, selector) for ratio in ratios]
    draw = partial(
        random_prompt,
        model.config.vocab_size,
        chunks=chunks,
        prefix_tokens=prefix_tokens,
        question_tokens=question_tokens,
    )
    rows = []
    for length in tokens:
        prompts = draw(length), draw(length, seed=1)
        announce_step = partial(_announce, announce, length)
        rows += _time_length(model, length, prompts, configs, repeats, peer, kv_dtype, announce_step)
    device = jax.tree.leaves(model.params)[0].devices().pop()
    return BenchReport(device.device_kind, jax.__version__, rows)


def _announce(announce: Callable[[str], None], length: int, step: str) -> None:
    announce(f"{length} tokens: {step}")


def _time_length(
    model: Model,
    length: int,
    prompts: tuple[Prompt, Prompt],
    configs: Sequence[BlendConfig],
    repeats: int,
    peer: str | None,
    kv_dtype: str | None,
    announce: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times all modes on the first prompt; the second, of the same lengths, shows whether anything compiles anew."""
    prompt, another = prompts
    with ExitStack() as opened:
        store = opened.enter_context(ChunkStore(host_bytes=STORE_BYTES, kv_dtype=kv_dtype))
        # Nothing stays on the device: TTFT includes loading from host memory.
        engines = [opened.enter_context(Engine(model, store, config, kept_bytes=0)) for config in configs]
        runner = engines[0].model.runner
        announce("precomputing and compiling")
        engines[0].precompute(prompt)
        prefills = _prefills(configs, engines)
        compile_s = {mode: prefill(prompt).compile_s for mode, prefill in prefills.items()}
        torch_ttft_s = None
        if peer is not None:
            torch_ttft_s = torch_prefill(model, prompt, engines[0].prefill(prompt, "full").next_token)
        compiled = runner.count
        samples: dict[str, list[PrefillStats]] = {mode: [] for mode in prefills}
        torch_seconds: list[float] = []
        for repeat in range(repeats):
            announce(f"round {repeat + 1} of {repeats}")
            for mode, prefill in prefills.items():
                time.sleep(PAUSE_S)
                samples[mode].append(prefill(prompt))
            if torch_ttft_s is not None:
                time.sleep(PAUSE_S)
                torch_seconds.append(torch_ttft_s())
        engines[0].precompute(another)
        for prefill in prefills.values():
            prefill(another)
    programs = {"programs": compiled, "compiles_after_warmup": runner.count - compiled}
    rows = [_row(mode, length, stats, samples["full"], compile_s[mode]) | programs for mode, stats in samples.items()]
    if torch_seconds:
        median = statistics.median(torch_seconds)
        rows.append({"tokens": length, "mode": "torch full", "ttft_s": median, "spread_s": _spread(torch_seconds)})
        rows[0]["over_torch"] = rows[0]["ttft_s"] / median
    return rows


def _prefills(configs: Sequence[BlendConfig], engines: Sequence[Engine]) -> dict[str, Callable[[Prompt], PrefillStats]]:
    """The prefills to be timed, by the names that tables give them."""

    def prefill(engine: Engine, mode: str, prompt: Prompt) -> PrefillStats:
        return engine.prefill(prompt, mode).stats

    prefills: dict[str, Callable[[Prompt], PrefillStats]]
    prefills = {mode: partial(prefill, engines[0], mode) for mode in ("full", "prefix", "reuse")}
    for config, engine in zip(configs, engines, strict=True):
        prefills[f"blend {config.recompute_ratio:g}"] = partial(prefill, engine, "blend")
    return prefills


def _row(
    mode: str, length: int, stats: Sequence[PrefillStats], full: Sequence[PrefillStats], compile_s: float
) -> dict[str, Any]:
    seconds = [run.ttft_s for run in stats]
    median, full_median = statistics.median(seconds), statistics.median(run.ttft_s for run in full)
    speed_up, ideal = full_median / median, full[0].flops / stats[0].flops
    return {
        "tokens": length,
        "mode": mode,
        "ttft_s": median,
        "spread_s": _spread(seconds),
        "tokens_per_s": stats[0].tokens / median,
        "speed_up": speed_up,
        "ideal_speed_up": ideal,
        "efficiency": speed_up / ideal,
        "recompute_ratio": stats[0].recompute_ratio,
        "host_share": statistics.median(run.host_s / run.ttft_s for run in stats),
        "load_share": statistics.median(run.load_s / run.ttft_s for run in stats),
        "flops": stats[0].flops,
        "compile_s": compile_s,
        "peak_memory_bytes": stats[0].peak_memory_bytes,
    }


def _spread(seconds: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    lower, upper = np.percentile(seconds, [25, 75])
    return float(upper - lower) / 2
