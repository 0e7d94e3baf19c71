"""What a prefill and a generation return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax
import numpy as np

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import Prefilled
from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache
from cacheblend_jax.model.layer_cache import CacheByLayer
from cacheblend_jax.runtime.placing import on_host, put


@dataclass(frozen=True)
class PrefillRun:
    """A finished prefill: what it computed, and its cost.

    Attributes:
        out: on the device.
        next_token: the likeliest next token, on the host.
        executor: `"resident"` or `"streamed"`.
        load_s: seconds of loading that nothing hid.
        run_s: seconds until the first token was on the host, loading included.
        peak_memory_bytes: device memory that its programs take, weights and KV included.
        paused_s: the part of `run_s` in which others went on.
    """

    out: Prefilled
    next_token: int
    executor: str
    load_s: float
    run_s: float
    peak_memory_bytes: int
    paused_s: float = 0.0


@dataclass(frozen=True)
class PrefillStats:
    """What a prefill did. Times are in wall-clock seconds.

    Attributes:
        mode: as asked for; `"extend"` where a context was continued (`Engine.extend`).
        ttft_s: from token ids on the host to the first output token id on the host; loading and waiting included,
            compilation excluded.
        host_s: the part of `ttft_s` for lookup, layout and everything else on the host except `load_s` and `wait_s`.
        load_s: the part of `ttft_s` for assembling the stored KV and transferring it to the device; if streamed, only
            the part that the prefill waited for, as computation did not hide it.
        compile_s: time spent compiling before the prefill could run; 0 once warm.
        hits, misses: chunks found in the store, and not found.
        exact: tokens whose stored KV is exact at its place: never recomputed.
        candidates: tokens whose stored KV is not exact at its place.
        forced: tokens computed at every layer.
        recompute_ratio: candidates computed afresh / candidates, mean over the layers after the check layer.
        flops: floating-point operations of the useful work (see `prefill_flops`).
        peak_memory_bytes: device memory that the prefill's program takes, weights and KV included.
        executor: `"resident"` or `"streamed"`.
        damaged: chunks that were in the store, but could not be read and were computed instead.
        decision: the controller's decision, if it chose the ratio.
        wait_s: the part of `ttft_s` spent waiting for other requests of the engine, and for chunks being stored.
        loaded: of each of the prompt's chunks, in order, whether its KV came from the store.
        paused_s: the part of `ttft_s` in which a long prefill let others go on, between its layers.
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
    loaded: tuple[bool, ...] = ()
    paused_s: float = 0.0

    @property
    def reused(self) -> int:
        """Tokens whose KV came from the store."""
        return self.exact + self.candidates


@dataclass(frozen=True, eq=False)
class Context:
    """What has been prefilled and decoded, to be continued.

    Attributes:
        token_ids: int32 `[tokens]`.
        cache: K, V of the first `num_cached` of them; what it holds beyond is padding.
    """

    token_ids: np.ndarray
    cache: KVCache | GrowingCache | CacheByLayer
    num_cached: int


@dataclass(frozen=True, eq=False)
class PrefillResult:
    """A prefilled prompt, ready to decode.

    Attributes:
        logits: float32 `[vocab]`, the next token's.
        token_ids: int32 `[tokens]`.
        next_token: the likeliest next token.
        stats: what was done, and how long it took.
        padded_cache: the blended KV; keys beyond the prompt's tokens are padding.
        computed_positions: for each layer, the positions whose K, V it computed afresh.
        plan: what its programs were compiled for.
    """

    logits: np.ndarray = field(repr=False)
    token_ids: np.ndarray = field(repr=False)
    next_token: int
    stats: PrefillStats
    padded_cache: KVCache = field(repr=False)
    computed_positions: list[np.ndarray] = field(repr=False)
    plan: Plan = field(repr=False)

    @cached_property
    def cache(self) -> KVCache:
        """The blended KV of exactly the prompt's tokens; `padded_cache` is not copied.

        It is cut on the host, once: a device would need a program for every length. Where several hosts share the mesh,
        all must read it, since they gather it together.
        """
        length = self.token_ids.size
        if self.padded_cache.k.shape[1] == length:
            return self.padded_cache
        return jax.tree.map(lambda x: put(on_host(x)[:, :length], x.sharding), self.padded_cache)

    @property
    def context(self) -> Context:
        """The prompt, to be continued."""
        return Context(self.token_ids, self.padded_cache, self.token_ids.size)

    @cached_property
    def recomputed(self) -> np.ndarray:
        """Bool `[layers, tokens]`: which tokens' KV each layer computed afresh."""
        mask = np.zeros((len(self.computed_positions), self.token_ids.size), bool)
        for layer, positions in enumerate(self.computed_positions):
            mask[layer, positions] = True
        return mask


@dataclass(frozen=True)
class GenerateStats:
    """Statistics of the prefill and of decoding: tokens after the first, and seconds per token (0 without any)."""

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
    """An answer. `text` is empty without a tokenizer; `token_ids` excludes the stop token."""

    text: str
    token_ids: list[int]
    stats: GenerateStats


@dataclass(frozen=True)
class BackgroundStats:
    """What an engine left undone after its requests; it costs later requests their hits, or time.

    Attributes:
        dropped: chunks that were missing and are not stored: too many waited already, the engine was closed, or no
            thread could be started.
        not_promoted: chunks that are not copied into a faster tier, for the same reasons.
        failed: chunks that could not be stored, or promoted; the log says why.
    """

    dropped: int = 0
    not_promoted: int = 0
    failed: int = 0


class StoredKeys(list[str]):
    """The keys of the chunks that are stored, in order.

    Attributes:
        unstored: the numbers of the chunks that are not: the store has no room for them.
    """

    def __init__(self, keys: Sequence[str], stored: Sequence[bool]) -> None:
        super().__init__(key for key, is_stored in zip(keys, stored, strict=True) if is_stored)
        self.unstored = [number for number, is_stored in enumerate(stored) if not is_stored]
