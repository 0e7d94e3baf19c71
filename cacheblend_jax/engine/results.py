"""What a prefill and a generation return."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.model.kv_cache import KVCache


@dataclass(frozen=True)
class PrefillStats:
    """What a prefill did. Times are seconds of wall clock.

    Attributes:
        ttft_s: from token ids on the host to the first output token id on the host; loading and waiting included,
            compilation not.
        host_s: of it, lookup, layout and everything else on the host but `load_s` and `wait_s`.
        load_s: of it, assembling the stored KV and handing it to the device; where it is streamed, only what the
            prefill waited for: loading that is not hidden behind computation.
        compile_s: spent compiling before the prefill could run; 0 once warm.
        hits, misses: chunks found in the store, and not.
        exact: tokens whose stored KV is exact at its place: never recomputed.
        candidates: tokens whose stored KV is not.
        forced: tokens computed at every layer.
        recompute_ratio: candidates computed afresh / candidates, mean over the layers after the check layer.
        flops: floating-point operations of the useful work (see `prefill_flops`).
        peak_memory_bytes: device memory that the prefill's program takes, weights and KV included.
        executor: `"resident"` or `"streamed"`.
        damaged: chunks that were in the store, could not be read, and were computed instead.
        decision: the controller's, where it chose the ratio.
        wait_s: of `ttft_s`, waiting for the engine's other requests, and for chunks that were just being stored.
    """

    mode: str
    tokens: int
    ttft_s: float
    host_s: float
    load_s: float
    compile_s: float
    hits: int
    misses: int
    exact: int
    candidates: int
    forced: int
    recompute_ratio: float
    flops: int
    peak_memory_bytes: int
    executor: str = "resident"
    damaged: int = 0
    decision: Decision | None = None
    wait_s: float = 0.0

    @property
    def reused(self) -> int:
        """Tokens whose KV came from the store."""
        return self.exact + self.candidates


@dataclass(frozen=True, eq=False)
class PrefillResult:
    """A prefilled prompt, ready to decode.

    Attributes:
        logits: float32 `[vocab]`, of the next token.
        token_ids: int32 `[tokens]`.
        next_token: the likeliest next token.
        stats: what was done, and how long it took.
        padded_cache: the blended KV; keys beyond the prompt's tokens are padding.
        computed_positions: for each layer, the positions whose K, V it computed afresh.
        plan: what its programs were compiled for.
    """

    logits: np.ndarray
    token_ids: np.ndarray
    next_token: int
    stats: PrefillStats
    padded_cache: KVCache = field(repr=False)
    computed_positions: list[np.ndarray] = field(repr=False)
    plan: Plan = field(repr=False)

    @property
    def cache(self) -> KVCache:
        """The blended KV of exactly the prompt's tokens."""
        return self.padded_cache.first(self.token_ids.size)

    @cached_property
    def recomputed(self) -> np.ndarray:
        """Bool `[layers, tokens]`: which tokens' KV each layer computed afresh."""
        mask = np.zeros((len(self.computed_positions), self.token_ids.size), bool)
        for layer, positions in enumerate(self.computed_positions):
            mask[layer, positions] = True
        return mask


@dataclass(frozen=True)
class GenerateStats:
    """The prefill's stats, and decoding's: tokens after the first, and seconds a token (0 where there is none)."""

    prefill: PrefillStats
    decoded: int
    seconds_per_token: float
    finish_reason: str  # "stop" or "length"

    @property
    def ttft_s(self) -> float:
        """Time to first token of the prefill."""
        return self.prefill.ttft_s


@dataclass(frozen=True)
class Generation:
    """An answer. `text` is empty without a tokenizer; `token_ids` leaves the stop token out."""

    text: str
    token_ids: list[int]
    stats: GenerateStats
