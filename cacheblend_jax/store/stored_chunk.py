"""A handle on one stored chunk, whose KV is read a layer at a time: what the executors load from."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cacheblend_jax.store.entry import ChunkEntry


class StoredChunk(Protocol):
    """A stored chunk, pinned against eviction until it is closed. Safe to read from several threads."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V, all layers."""

    @property
    def tier(self) -> str:
        """Where it is read from: `"host"` or `"disk"`."""

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns K (before RoPE) and V of one layer, each `[tokens, kv_heads, head_dim]`.

        Raises:
            DamagedEntryError: what is stored is not what was written; the store has dropped the entry.
        """

    def close(self) -> None:
        """Unpins the chunk; may be called again."""

    def __enter__(self) -> StoredChunk: ...
    def __exit__(self, *_: object) -> None: ...


class HostChunk:
    """An entry in host memory, as a `StoredChunk`: the handle's reference is its pin."""

    tier = "host"

    def __init__(self, entry: ChunkEntry) -> None:
        self._entry = entry
        self.num_tokens = entry.num_tokens
        self.num_layers = entry.k.shape[0]
        self.num_bytes = entry.num_bytes

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns views of one layer's K and V."""
        return self._entry.k[layer], self._entry.v[layer]

    def close(self) -> None:
        """Nothing is held but memory."""

    def __enter__(self) -> HostChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
