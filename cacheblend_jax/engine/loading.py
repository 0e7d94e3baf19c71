"""Loading: reads the KV of a prompt's chunks from their tiers to its place in host memory, or on the device.

Fetching one layer's KV of given chunks is the first of the paper's three interfaces (CacheBlend, arXiv 2405.16444, §6);
the second, waiting for it, is `engine.layer_stream`; the third, a layer's prefill, is `blend.steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import is_slow

READERS = 4  # reads at a time; a reader mostly waits for its tier


class LostChunkError(Exception):
    """A chunk is in the store, but could not be read: it is damaged, or its tier failed."""

    def __init__(self, key: str, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.key = key


def read_into(chunk: PlacedChunk, layer: int, k: np.ndarray, v: np.ndarray, trace: Trace | None) -> None:
    """Reads one layer of one chunk into its rows of `k` and `v`, each `[keys, kv_heads, head_dim]`.

    Raises:
        LostChunkError: it is damaged, its tier failed, or it is not this chunk's KV for this model.
    """

    def span(lane: str) -> AbstractContextManager[None]:
        return nullcontext() if trace is None else trace.span(lane, f"layer {layer} at {chunk.start}", layer)

    try:
        with span(chunk.tier) if is_slow(chunk.tier) else nullcontext():
            k_layer, v_layer = chunk.handle.read_layer(layer)
    except (DamagedEntryError, OSError, IndexError) as error:
        raise LostChunkError(chunk.key, error) from error
    with span("host"):
        for rows, stored in ((k[chunk.start : chunk.stop], k_layer), (v[chunk.start : chunk.stop], v_layer)):
            if (stored.shape, stored.dtype) != (rows.shape, rows.dtype):  # numpy would broadcast or cast it
                wrong = f"stored as {stored.dtype}{list(stored.shape)}, expected {rows.dtype}{list(rows.shape)}"
                raise LostChunkError(chunk.key, ValueError(wrong))
            rows[:] = stored


def load_all(
    chunks: Sequence[PlacedChunk], k: np.ndarray, v: np.ndarray, readers: ThreadPoolExecutor, trace: Trace | None = None
) -> None:
    """Reads every layer of the chunks into `k` and `v`, each `[layers, keys, kv_heads, head_dim]`.

    Raises:
        LostChunkError: a chunk is damaged or its tier failed.
    """
    slow = any(is_slow(chunk.tier) for chunk in chunks)
    reads = [(chunk, layer, k[layer], v[layer], trace) for layer in range(len(k)) for chunk in chunks]
    if not slow:  # copies within memory: threads would cost more than they save
        for read in reads:
            read_into(*read)
        return
    futures = [readers.submit(read_into, *read) for read in reads]
    try:
        for future in futures:
            future.result()
    finally:
        abandon(futures)


def place(
    cached: KVCache,
    k: Float[Array, "layers rows kv_heads head_dim"],
    v: Float[Array, "layers rows kv_heads head_dim"],
    start: Int[Array, ""],
    tokens: Int[Array, ""],
) -> KVCache:
    """Writes a chunk that is on the device into its places in all layers' KV; its rows from `tokens` on are padding."""
    keys = cached.k.shape[1]
    rows = jnp.arange(k.shape[1], dtype=jnp.int32)
    places = jnp.where(rows < tokens, start + rows, keys)  # padding goes beyond the end, and is dropped
    return KVCache(cached.k.at[:, places].set(k, mode="drop"), cached.v.at[:, places].set(v, mode="drop"))


def place_first(
    k: Float[Array, "layers rows kv_heads head_dim"],
    v: Float[Array, "layers rows kv_heads head_dim"],
    start: Int[Array, ""],
    tokens: Int[Array, ""],
    *,
    keys: int,
) -> KVCache:
    """As `place`, into `keys` rows of zeros."""
    shape = (k.shape[0], keys, *k.shape[2:])
    return place(KVCache(jnp.zeros(shape, k.dtype), jnp.zeros(shape, v.dtype)), k, v, start, tokens)


def abandon(futures: Sequence[Future]) -> None:
    """Cancels reads that have not begun and waits for the others, after which nothing writes into the buffers."""
    for future in futures:
        future.cancel()
    wait(futures)
