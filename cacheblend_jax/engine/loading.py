"""Loading: reads the KV of a prompt's chunks from their tiers to its place in host memory, or on the device.

Fetching one layer's KV of given chunks is the first of the paper's three interfaces (CacheBlend, arXiv 2405.16444, §6);
the second, waiting for it, is `engine.layer_stream` or `engine.page_stream`; the third, a layer's prefill, is
`blend.steps`.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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
MOST_COPIERS = 6  # threads that copy within memory: more are slower (docs/results.md)
SHARE_BYTES = 2**20  # of a layer, at least, for each thread: handing over less costs more than it saves
LAYERS_TOGETHER = 4  # that a thread copies before it is given more


class LostChunkError(Exception):
    """A chunk is in the store, but could not be read: it is damaged, or its tier failed."""

    def __init__(self, chunk: PlacedChunk, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.key, self.tier = chunk.key, chunk.tier


def copiers() -> int:
    """Returns how many threads copy KV within host memory at a time: half of the processors, up to six."""
    return max(1, min(MOST_COPIERS, (os.cpu_count() or 1) // 2))


HostRows = np.ndarray | QuantisedRows  # K's rows on the host, or V's; on the device, the same of JAX arrays


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


class Piece(NamedTuple):
    """Some of a chunk's rows: `first` to `stop`, counted from the chunk's first."""

    chunk: PlacedChunk
    first: int
    stop: int


def shares(chunks: Sequence[PlacedChunk], threads: int) -> list[list[Piece]]:
    """Divides the reading of a layer into tasks.

    A chunk of a slow tier is a task of its own. Those in memory are cut into as many equal shares as there are threads
    to copy them, or fewer where a share would be small.
    """
    tasks, in_memory = [], []
    for chunk in chunks:
        whole = Piece(chunk, 0, chunk.num_tokens)
        if is_slow(chunk.tier) or threads == 1:
            tasks.append([whole])
        else:
            in_memory.append(whole)
    if not in_memory:
        return tasks
    rows = sum(piece.stop for piece in in_memory)
    layer_bytes = sum(piece.chunk.handle.num_bytes // piece.chunk.handle.num_layers for piece in in_memory)
    count = max(1, min(threads, layer_bytes // SHARE_BYTES))
    return tasks + _cut(in_memory, -(-rows // count))


def _cut(pieces: Sequence[Piece], rows: int) -> list[list[Piece]]:
    """Cuts pieces, in order, into lists of so many rows each; the last may have fewer."""
    lists: list[list[Piece]] = [[]]
    room = rows
    for chunk, first, stop in pieces:
        while first < stop:
            if not room:
                lists.append([])
                room = rows
            taken = min(room, stop - first)
            lists[-1].append(Piece(chunk, first, first + taken))
            first, room = first + taken, room - taken
    return lists


class LayerRows(NamedTuple):
    """Where a layer's KV goes on the host: K and V, each `[keys, kv_heads, head_dim]`, quantised or not."""

    layer: int
    k: HostRows
    v: HostRows


class LayerReads:
    """Reads layers of chunks' KV to their places in host buffers, by reader threads.

    Args:
        buffers: K and V, each `[host_layers, keys, kv_heads, head_dim]`, quantised or not.
        threads: how many copy within host memory at a time.

    Attributes:
        most_layers: how many are worth reading together. Threads that copy within memory wait for each other to be
            given work, and it takes as long as copying a layer's share. From a slow tier, layers come one by one.
    """

    def __init__(
        self,
        chunks: Sequence[PlacedChunk],
        buffers: tuple[HostRows, HostRows],
        readers: Executor,
        trace: Trace | None,
        threads: int,
    ) -> None:
        self._shares = shares(chunks, threads)
        self._buffers, self._readers, self._trace = buffers, readers, trace
        is_copied = threads > 1 and not any(is_slow(chunk.tier) for chunk in chunks)
        self.most_layers = LAYERS_TOGETHER if is_copied else 1

    def begin(self, layers: range, slot: int) -> list[Future]:
        """Begins to read some layers, consecutive ones, into the buffers' layers from `slot` on.

        Raises (from the futures):
            LostChunkError: a chunk is damaged, its tier failed, or what is stored is not its KV for this model.
        """
        rows = self._rows(layers, slot)
        return [submit_or_run(self._readers, read_share, share, rows, self._trace) for share in self._shares]

    def read(self, layers: range) -> None:
        """Reads some layers, in this thread, into the buffers' layers of the same numbers."""
        for share in self._shares:
            read_share(share, self._rows(layers, layers.start), self._trace)

    def _rows(self, layers: range, slot: int) -> list[LayerRows]:
        return [
            LayerRows(layer, *jax.tree.map(operator.itemgetter(place), self._buffers))
            for place, layer in enumerate(layers, slot)
        ]


def batches(num_layers: int, most: int) -> list[range]:
    """Divides so many layers, in order, into those that are read together, at most so many.

    The first ones are few: a prefill waits for them.
    """
    found, first = list[range](), 0
    while first < num_layers:
        found.append(range(first, min(num_layers, first + max(1, min(most, first)))))
        first = found[-1].stop
    return found


def read_share(share: Sequence[Piece], layers: Sequence[LayerRows], trace: Trace | None) -> None:
    """Reads some layers of some pieces into their rows of each layer's `k` and `v`.

    Where a chunk says which of its heads are loaded (`PlacedChunk.heads`), `k` and `v` have these alone. They are
    dequantised where `k` and `v` are not quantised.

    Raises:
        LostChunkError: a chunk is damaged, its tier failed, or what is stored is not its KV for this model.
    """
    for rows in layers:
        for piece in share:
            _read_piece(piece, *rows, trace)


def _read_piece(piece: Piece, layer: int, k: HostRows, v: HostRows, trace: Trace | None) -> None:
    chunk, first, stop = piece

    def span(lane: str) -> AbstractContextManager[None]:
        return nullcontext() if trace is None else trace.span(lane, f"layer {layer} at {chunk.start + first}", layer)

    try:
        with span(chunk.tier) if is_slow(chunk.tier) else nullcontext():
            read = chunk.handle.read_layer
            k_layer, v_layer = read(layer) if chunk.heads is None else read(layer, chunk.heads)
    except (DamagedEntryError, OSError, IndexError) as error:
        raise LostChunkError(chunk, error) from error
    with span("host"):
        for rows, stored in _pairs(k, k_layer, first, stop) + _pairs(v, v_layer, first, stop):
            place = rows[chunk.start + first : chunk.start + stop]
            if (stored.shape, stored.dtype) != (place.shape, place.dtype):  # numpy would broadcast or cast it
                wrong = f"stored as {stored.dtype}{list(stored.shape)}, expected {place.dtype}{list(place.shape)}"
                raise LostChunkError(chunk, ValueError(wrong))
            place[:] = stored


def _pairs(rows: HostRows, stored: StoredRows, first: int, stop: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the arrays to write, with what some of a chunk's rows are to be there."""
    if isinstance(rows, QuantisedRows):
        assert isinstance(stored, QuantisedRows)  # `kv_dtype_of`
        return [(rows.codes, stored.codes[first:stop]), (rows.scales, stored.scales[first:stop])]
    if isinstance(stored, QuantisedRows):
        part = QuantisedRows(stored.codes[first:stop], stored.scales[first:stop], stored.offset)
        return [(rows, part.dequantised(rows.dtype))]
    return [(rows, stored[first:stop])]


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
    reads, futures = LayerReads(chunks, (k, v), readers, trace, threads), list[Future]()
    num_layers = len(jax.tree.leaves(k)[0])
    if threads == 1 and not any(is_slow(chunk.tier) for chunk in chunks):
        reads.read(range(num_layers))
        return
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
