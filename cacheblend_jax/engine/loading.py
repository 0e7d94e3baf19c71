"""Loading: reads the KV of a prompt's chunks from their tiers to its place in host memory, or on the device.

Fetching one layer's KV of given chunks is the first of the paper's three interfaces (CacheBlend, arXiv 2405.16444, §6);
the second, waiting for it, is `engine.layer_stream`; the third, a layer's prefill, is `blend.steps`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import is_slow

READERS = 4  # reads at a time; a reader mostly waits for its tier


class LostChunkError(Exception):
    """A chunk is in the store, but could not be read: it is damaged, or its tier failed."""

    def __init__(self, chunk: PlacedChunk, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.key, self.tier = chunk.key, chunk.tier


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
        raise LostChunkError(chunk, error) from error
    with span("host"):
        for rows, stored in ((k[chunk.start : chunk.stop], k_layer), (v[chunk.start : chunk.stop], v_layer)):
            if (stored.shape, stored.dtype) != (rows.shape, rows.dtype):  # numpy would broadcast or cast it
                wrong = f"stored as {stored.dtype}{list(stored.shape)}, expected {rows.dtype}{list(rows.shape)}"
                raise LostChunkError(chunk, ValueError(wrong))
            rows[:] = stored


def load_all(
    chunks: Sequence[PlacedChunk], k: np.ndarray, v: np.ndarray, readers: Executor, trace: Trace | None = None
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
    futures: list[Future] = []
    try:
        for read in reads:
            futures.append(submit_or_run(readers, read_into, *read))
        for future in futures:
            future.result()
    finally:
        abandon(futures)


def place_chunk(
    run: Callable[..., Any], cached: KVCache | None, chunk: KVCache, start: int, num_tokens: int, num_keys: int
) -> KVCache:
    """Writes a chunk that is on the device into its place in all layers' KV, which begins as zeros where it is `None`.

    Args:
        run: runs the program, or takes its shapes (`runtime.programs.Runner`).
        chunk: `[layers, rows, kv_heads, head_dim]`; its rows from `num_tokens` on are padding.
        num_keys: keys of the prompt's cache.
    """
    at = np.int32(start), np.int32(num_tokens)
    if cached is None:
        return run(_place_first, chunk, *at, num_keys=num_keys)
    return run(_place, cached, chunk, *at, donate=("cached",))


def _place(cached: KVCache, chunk: KVCache, start: Int[Array, ""], num_tokens: Int[Array, ""]) -> KVCache:
    num_keys = cached.k.shape[1]
    rows = jnp.arange(chunk.k.shape[1], dtype=jnp.int32)
    places = jnp.where(rows < num_tokens, start + rows, num_keys)  # padding goes beyond the end, and is dropped
    return jax.tree.map(lambda whole, part: whole.at[:, places].set(part, mode="drop"), cached, chunk)


def _place_first(chunk: KVCache, start: Int[Array, ""], num_tokens: Int[Array, ""], *, num_keys: int) -> KVCache:
    empty = jax.tree.map(lambda part: jnp.zeros((part.shape[0], num_keys, *part.shape[2:]), part.dtype), chunk)
    return _place(empty, chunk, start, num_tokens)


def submit_or_run(pool: Executor, function: Callable[..., object], *args: object) -> Future:
    """Has a pool call a function; calls it here where the pool can start no thread.

    Such a pool may keep the task nevertheless, and run it once it has a thread. It is called once all the same, and not
    after `abandon`, when its buffers may be in use for another request.
    """
    future: Future = Future()
    begun = threading.Lock()

    def run() -> None:
        if not (begun.acquire(blocking=False) and future.set_running_or_notify_cancel()):
            return
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    try:
        pool.submit(run)
    except RuntimeError:
        run()
    return future


def abandon(futures: Sequence[Future]) -> None:
    """Cancels reads that have not begun and waits for the others, after which nothing writes into the buffers."""
    for future in futures:
        future.cancel()
    wait(futures)
