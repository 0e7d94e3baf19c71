"""Handles on stored entries: they keep an entry from being evicted while a request reads it layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry, Rows
from cacheblend_jax.store.head_groups import check_heads
from cacheblend_jax.store.quantise import QuantisedRows

StoredRows = Rows | QuantisedRows


@runtime_checkable
class StoredChunk(Protocol):
    """A stored entry in use: it is not evicted before `close`. Safe to use from several threads.

    A tier may have to evict one all the same, where more are in use than it can hold: reading it then raises.

    Attributes:
        shape, dtype: of K and of V: `[layers, tokens, kv_heads, head_dim]`.
        kv_dtype: of the codes where K and V are quantised, else `None`.
        has_k_offset: whether something was subtracted from keys first: `ChunkEntry.k_offset`.
        num_tokens, num_layers: the entry's.
        num_bytes: of K and V as they are stored, all layers together.
        tier: where it is read from: `"device"`, `"host"`, `"disk"`, or another, which counts as slower than memory.
        device_entry: the entry itself where it is in the device's memory, so that nothing need be read.
        host_entry: the entry itself where it is in host memory, so that a device may read it there; else `None`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    kv_dtype: str | None
    has_k_offset: bool
    num_tokens: int
    num_layers: int
    num_bytes: int
    tier: str
    device_entry: DeviceEntry | None
    host_entry: ChunkEntry | None

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """Returns K before RoPE and V of one layer, each `[tokens, kv_heads, head_dim]`, as they are stored.

        Args:
            heads: the KV heads to return, consecutive; a tier on disk reads, and checks, little more than their bytes.
                `None`: all.

        Raises:
            DamagedEntryError: the bytes on disk are not those that were written; the store has quarantined the entry
                and counted it.
            IndexError: there is no such layer, or there are no such heads.
        """

    def close(self) -> None:
        """Lets the entry go. Calling it again does nothing."""

    def __enter__(self) -> StoredChunk: ...

    def __exit__(self, *_: object) -> None: ...


class HostChunk:
    """A `StoredChunk` in host memory.

    Args:
        unpin: called once, by `close`.
    """

    tier = "host"
    device_entry: DeviceEntry | None = None

    def __init__(self, entry: ChunkEntry, unpin: Callable[[], None]) -> None:
        self._entry = entry
        self.host_entry: ChunkEntry | None = entry
        self._unpin: Callable[[], None] | None = unpin
        self.shape, self.dtype, self.kv_dtype = entry.k.shape, entry.dtype, entry.kv_dtype
        self.has_k_offset = "k_offset" in entry.arrays()
        self.num_layers, self.num_tokens = self.shape[:2]
        self.num_bytes = entry.num_bytes

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        check_layer(layer, self.num_layers)
        k, v = self._entry.layer(layer)
        if heads is None:
            return k, v
        check_heads(heads, self.shape[2])
        return of_heads(k, heads), of_heads(v, heads)

    def close(self) -> None:
        """See `StoredChunk`."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def __enter__(self) -> HostChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceChunk:
    """A `StoredChunk` in the device's memory.

    Args:
        unpin: called once, by `close`.
    """

    tier = "device"
    host_entry: ChunkEntry | None = None

    def __init__(self, entry: DeviceEntry, unpin: Callable[[], None]) -> None:
        self.entry = entry
        self.device_entry: DeviceEntry | None = entry
        self._unpin: Callable[[], None] | None = unpin
        self.shape = (entry.k.shape[0], entry.num_tokens, *entry.k.shape[2:])
        self.dtype, self.kv_dtype = entry.dtype, entry.kv_dtype
        self.has_k_offset = entry.kv_dtype is not None and entry.k_offset is not None
        self.num_layers, self.num_tokens = self.shape[:2]
        self.num_bytes = entry.whole_bytes * entry.num_tokens // entry.k.shape[1]

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`. The first call copies all layers to the host."""
        return self._on_host.read_layer(layer, heads)

    @cached_property
    def _on_host(self) -> HostChunk:
        return HostChunk(self.entry.on_host(), lambda: None)

    def close(self) -> None:
        """See `StoredChunk`."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def __enter__(self) -> DeviceChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def of_heads(rows: np.ndarray | QuantisedRows, heads: range) -> np.ndarray | QuantisedRows:
    """Returns some consecutive heads of a layer's rows, as views."""
    chosen = slice(heads.start, heads.stop)
    if not isinstance(rows, QuantisedRows):
        return rows[:, chosen]
    offset = None if rows.offset is None else rows.offset[chosen]
    return QuantisedRows(rows.codes[:, chosen], rows.scales[:, chosen], offset)


def is_slow(tier: str) -> bool:
    """Whether a tier is slower than host memory."""
    return tier not in ("device", "host")


def check_layer(layer: int, num_layers: int) -> None:
    """Checks that an entry has a layer.

    Raises:
        IndexError: it has not.
    """
    if not 0 <= layer < num_layers:
        raise IndexError(f"layer must be in [0, {num_layers - 1}], got {layer}")
