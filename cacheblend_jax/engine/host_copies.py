"""Copies of KV that lies in host memory to its places there: many layers at a time, on threads that run no Python.

Python's own threads would take turns: after each copy they wait for the interpreter's lock, and where a processor must
be woken for that, it takes as long as copying a hundred kilobytes. TensorStore copies on threads of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import tensorstore as ts

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.quantise import QuantisedRows

HostRows = np.ndarray | QuantisedRows  # K's rows on the host, or V's; on the device, the same of JAX arrays


class HostCopies:
    """Copies layers of chunks' KV to their rows in host buffers.

    Args:
        chunks: those that `is_copied` is true of.
        buffers: K and V, each `[host_layers, keys, kv_heads, head_dim]`, quantised or not.
        threads: how many copy at a time.
    """

    def __init__(self, chunks: Sequence[PlacedChunk], buffers: tuple[HostRows, HostRows], threads: int) -> None:
        context = ts.Context({"data_copy_concurrency": {"limit": threads}})
        targets = [ts.array(leaf, context=context) for leaf in jax.tree.leaves(buffers)]
        self._pairs: list[tuple[ts.TensorStore, ts.TensorStore]] = []
        for chunk in chunks:
            heads = slice(None) if chunk.heads is None else slice(chunk.heads.start, chunk.heads.stop)
            for target, source in zip(targets, _leaves(_entry_of(chunk)), strict=True):
                place = target[:, chunk.start : chunk.stop, heads]
                self._pairs.append((place, ts.array(source, context=context)[:, :, heads]))

    def copy(self, layers: range, slot: int) -> None:
        """Copies some layers, consecutive ones, to the buffers' layers from `slot` on; returns when all are there."""
        slots = slice(slot, slot + len(layers))
        chosen = slice(layers.start, layers.stop)
        writes = [
            # What is copied is not changed before the last one is done: nobody need copy it for that.
            place[slots].write(source[chosen], can_reference_source_data_indefinitely=True)
            for place, source in self._pairs
        ]
        for write in writes:
            write.result()


def is_copied(chunk: PlacedChunk, buffers: tuple[HostRows, HostRows]) -> bool:
    """Returns whether a chunk's KV lies in host memory as the buffers are to hold it, so that copying is all."""
    entry = chunk.handle.host_entry
    if entry is None or (entry.kv_dtype is not None) != isinstance(buffers[0], QuantisedRows):
        return False
    rows = [(leaf.dtype, leaf.shape[2:]) for leaf in jax.tree.leaves(buffers)]
    return rows == [(leaf.dtype, leaf.shape[2:]) for leaf in _leaves(entry)] and entry.num_tokens == chunk.num_tokens


def _entry_of(chunk: PlacedChunk) -> ChunkEntry:
    entry = chunk.handle.host_entry
    assert entry is not None  # `is_copied`
    return entry


def _leaves(entry: ChunkEntry) -> list[np.ndarray]:
    """Returns what an entry's K and V consist of, in the order of the buffers' leaves."""
    return [entry.k, entry.v] if entry.scales is None else [entry.k, entry.scales.k, entry.v, entry.scales.v]
