"""Loading: reads the KV of a prompt's chunks from their tiers to its place in host memory, or on the device.

Fetching one layer's KV of given chunks is the first of the paper's three interfaces (CacheBlend, arXiv 2405.16444, §6);
the second, waiting for it, is `engine.layer_stream`; the third, a layer's prefill, is `blend.steps`.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cacheblend_jax.engine.host_copies import HostCopies, HostRows, is_copied
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.quantised_kv import StoredCache, StoredLayer
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import is_slow
from cacheblend_jax.store.quantise import QuantisedRows
from cacheblend_jax.store.stored_chunk import StoredRows
from pallas_kernels import QuantisedKV

READERS = 4  # reads at a time; a reader mostly waits for its tier
MOST_COPIERS = 14  # threads that copy within memory: more don't gain
LAYERS_TOGETHER = 4  # that are copied by one task, at most: of Llama 3 8B and 8,192 tokens, 134 MB


class LostChunkError(Exception):
    """A chunk is in the store, but could not be read: it is damaged, or its tier failed."""

    def __init__(self, chunk: PlacedChunk, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.key, self.tier = chunk.key, chunk.tier


def copiers() -> int:
    """Returns how many threads copy KV within host memory at a time: all processors but two, up to fourteen."""
    return max(1, min(MOST_COPIERS, (os.cpu_count() or 1) - 2))


def kv_dtype_of(chunks: Sequence[PlacedChunk], readable: Collection[str], *, has_key_bias: bool) -> str | None:
    """Returns what the stored KV of a prompt is on its way to the device, and there: codes of a dtype, or values.

    Codes only where all chunks are stored so: a prompt's cached KV is of one kind, so that a plan has a program for
    each kind, not for each mixture. Of a mixture, the quantised chunks are dequantised on the host as they are read.

    Args:
        readable: the dtypes of codes that the device reads.
        has_key_bias: whether the device adds the model's bias to keys. Codes from which it was not subtracted (of an
            entry that was put without `k_offset`, say) are dequantised on the host.
    """
    handles = [chunk.handle for chunk in chunks]
    kinds = {handle.kv_dtype if handle.has_k_offset == has_key_bias else None for handle in handles}
    (kind,) = kinds if len(kinds) == 1 else (None,)
    return kind if kind in readable else None


def layer_of(rows: Sequence[Any]) -> StoredLayer:
    """Returns one layer's K and V as programs take them."""
    return _codes_of(*rows) if isinstance(rows[0], QuantisedRows) else LayerKV(*rows)


def cache_of(stacks: Sequence[Any]) -> StoredCache:
    """As `layer_of`, for all layers."""
    return _codes_of(*stacks) if isinstance(stacks[0], QuantisedRows) else KVCache(*stacks)


def _codes_of(k: Any, v: Any) -> QuantisedKV:
    return QuantisedKV(k.codes, v.codes, k.scales, v.scales)


class LayerReads:
    """Reads layers of chunks' KV to their places in host buffers, by reader threads.

    What lies in host memory is copied, several layers at a time where there is nothing else to read. From a slow tier,
    or where KV must be dequantised, each layer of a chunk is a task.

    Args:
        buffers: K and V, each `[host_layers, keys, kv_heads, head_dim]`, quantised or not.
        threads: how many copy within host memory at a time. 1: the reader threads copy, a layer of a chunk each.

    Attributes:
        most_layers: how many are worth reading together.
    """

    def __init__(
        self,
        chunks: Sequence[PlacedChunk],
        buffers: tuple[HostRows, HostRows],
        readers: Executor,
        trace: Trace | None,
        threads: int,
    ) -> None:
        copied = [chunk for chunk in chunks if is_copied(chunk, buffers)] if threads > 1 else []
        self._read = [chunk for chunk in chunks if chunk not in copied]
        self._copies = HostCopies(copied, buffers, threads) if copied else None
        self._buffers, self._readers, self._trace = buffers, readers, trace
        self.most_layers = 1 if self._read else LAYERS_TOGETHER

    def begin(self, layers: range, slot: int) -> list[Future]:
        """Begins to read some layers, consecutive ones, into the buffers' layers from `slot` on.

        Raises (from the futures):
            LostChunkError: a chunk is damaged, its tier failed, or what is stored is not its KV for this model.
        """
        tasks: list[Future] = []
        if self._copies is not None:
            tasks.append(submit_or_run(self._readers, self._copy, self._copies, layers, slot))
        for place, layer in enumerate(layers, slot):
            k, v = jax.tree.map(operator.itemgetter(place), self._buffers)
            for chunk in self._read:
                tasks.append(submit_or_run(self._readers, read_chunk, chunk, layer, k, v, self._trace))
        return tasks

    def _copy(self, copies: HostCopies, layers: range, slot: int) -> None:
        name = f"layers {layers.start} to {layers.stop - 1}"
        with nullcontext() if self._trace is None else self._trace.span("host", name, layers.start):
            copies.copy(layers, slot)


def batches(num_layers: int, most: int) -> list[range]:
    """Divides so many layers, in order, into those that are read together, at most so many.

    The first ones are few: a prefill waits for them.
    """
    found, first = list[range](), 0
    while first < num_layers:
        found.append(range(first, min(num_layers, first + max(1, min(most, first)))))
        first = found[-1].stop
    return found


def read_chunk(chunk: PlacedChunk, layer: int, k: HostRows, v: HostRows, trace: Trace | None) -> None:
    """Reads one layer of a chunk into its rows of `k` and `v`, each `[keys, kv_heads, head_dim]`.

    It is dequantised where `k` and `v` are not quantised.

    Raises:
        LostChunkError: the chunk is damaged, its tier failed, or what is stored is not its KV for this model.
    """

    def span(lane: str) -> AbstractContextManager[None]:
        return nullcontext() if trace is None else trace.span(lane, f"layer {layer} at {chunk.start}", layer)

    try:
        with span(chunk.tier) if is_slow(chunk.tier) else nullcontext():
            read = chunk.handle.read_layer
            k_layer, v_layer = read(layer) if chunk.heads is None else read(layer, chunk.heads)
    except (DamagedEntryError, OSError, IndexError) as error:
        raise LostChunkError(chunk, error) from error
    with span("host"):
        for rows, stored in _pairs(k, k_layer) + _pairs(v, v_layer):
            place = rows[chunk.start : chunk.stop]
            if chunk.heads is not None:
                place = place[:, chunk.heads.start : chunk.heads.stop]
            if (stored.shape, stored.dtype) != (place.shape, place.dtype):  # numpy would broadcast or cast it
                wrong = f"stored as {stored.dtype}{list(stored.shape)}, expected {place.dtype}{list(place.shape)}"
                raise LostChunkError(chunk, ValueError(wrong))
            place[:] = stored


def _pairs(rows: HostRows, stored: StoredRows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the arrays to write, with what a chunk's rows are to be there."""
    if isinstance(rows, QuantisedRows):
        assert isinstance(stored, QuantisedRows)  # `kv_dtype_of`
        return [(rows.codes, stored.codes), (rows.scales, stored.scales)]
    return [(rows, stored.dequantised(rows.dtype) if isinstance(stored, QuantisedRows) else stored)]


def load_all(
    chunks: Sequence[PlacedChunk],
    k: HostRows,
    v: HostRows,
    readers: Executor,
    trace: Trace | None = None,
    *,
    threads: int = 1,
) -> None:
    """Reads every layer of the chunks into `k` and `v`, each `[layers, keys, kv_heads, head_dim]`.

    Args:
        threads: how many copy within host memory at a time.

    Raises:
        LostChunkError: a chunk is damaged or its tier failed.
    """
    num_layers = len(jax.tree.leaves(k)[0])
    if threads == 1 and not any(is_slow(chunk.tier) for chunk in chunks):
        for layer in range(num_layers):
            of_layer = jax.tree.map(operator.itemgetter(layer), (k, v))
            for chunk in chunks:
                read_chunk(chunk, layer, *of_layer, trace)
        return
    reads, futures = LayerReads(chunks, (k, v), readers, trace, threads), list[Future]()
    try:
        for layers in batches(num_layers, reads.most_layers):
            futures += reads.begin(layers, layers.start)
        for future in futures:
            future.result()
    finally:
        abandon(futures)


def place_chunk(
    run: Callable[..., Any], cached: StoredCache | None, chunk: StoredCache, start: int, num_tokens: int, num_keys: int
) -> StoredCache:
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


def _place(cached: StoredCache, chunk: StoredCache, start: Int[Array, ""], num_tokens: Int[Array, ""]) -> StoredCache:
    num_keys = cached.k.shape[1]
    rows = jnp.arange(chunk.k.shape[1], dtype=jnp.int32)
    places = jnp.where(rows < num_tokens, start + rows, num_keys)  # padding goes beyond the end, and is dropped
    return jax.tree.map(lambda whole, part: whole.at[:, places].set(part, mode="drop"), cached, chunk)


def _place_first(
    chunk: StoredCache, start: Int[Array, ""], num_tokens: Int[Array, ""], *, num_keys: int
) -> StoredCache:
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
