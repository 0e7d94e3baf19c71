"""An entry in a device's memory, and the handle on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cacheblend_jax.store.entry import ChunkEntry, HostChunk


@dataclass(frozen=True, eq=False)
class DeviceEntry:
    """A `ChunkEntry` whose `k` and `v` are jax arrays `[layers, rows, kv_heads, head_dim]`: tokens first, then padding.

    Padded, since programs are compiled for shapes: chunks of many lengths share few.
    """

    k: Any
    v: Any
    num_tokens: int
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that K and V take on the device (on each, where a mesh has copies)."""
        return self.k.nbytes + self.v.nbytes

    def on_host(self) -> ChunkEntry:
        """Copies the entry to the host."""
        k, v = (np.array(array[:, : self.num_tokens]) for array in (np.asarray(self.k), np.asarray(self.v)))
        return ChunkEntry(k, v, self.fingerprint, self.context_ids)


class DeviceChunk:
    """A `StoredChunk` on the device; `entry` is for who computes there."""

    tier = "device"

    def __init__(self, entry: DeviceEntry, unpin: Callable[[], None]) -> None:
        self.entry = entry
        self._unpin: Callable[[], None] | None = unpin
        self.num_tokens = entry.num_tokens
        self.num_layers = entry.k.shape[0]
        self.num_bytes = entry.num_bytes * entry.num_tokens // entry.k.shape[1]

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `StoredChunk`; the first layer that is read brings all of them to the host."""
        return self._on_host.read_layer(layer)

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
