"""One chunk's stored KV, and the handle that reads it layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class ChunkEntry:
    """K before RoPE and V of a chunk computed alone, each `[layers, tokens, kv_heads, head_dim]`, on the host.

    `fingerprint` (the model's) and `context_ids` say what it was computed from and after; a store keeps them on disk
    for people to read. Neither finds an entry: keys do.
    """

    k: np.ndarray
    v: np.ndarray
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.ndim != 4 or self.k.dtype != self.v.dtype:
            raise ValueError(
                "k and v must be of one shape [layers, tokens, kv_heads, head_dim] and one dtype, "
                f"got {self.k.dtype}{list(self.k.shape)} and {self.v.dtype}{list(self.v.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.k.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V."""
        return self.k.nbytes + self.v.nbytes


class StoredChunk(Protocol):
    """A stored entry that is in use: it is not evicted until `close`. Safe to use from several threads.

    Attributes:
        num_tokens, num_layers: the entry's.
        num_bytes: of K and V of all layers.
        tier: where it is read from, `"device"`, `"host"` or `"disk"`.
    """

    num_tokens: int
    num_layers: int
    num_bytes: int
    tier: str

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns K before RoPE and V of one layer, each `[tokens, kv_heads, head_dim]`.

        Raises:
            DamagedEntryError: the bytes on disk are not those written; the store has quarantined and counted it.
            IndexError: no such layer.
        """

    def close(self) -> None:
        """Lets the entry go; once or more."""

    def __enter__(self) -> StoredChunk: ...

    def __exit__(self, *_: object) -> None: ...


class HostChunk:
    """A `StoredChunk` in host memory."""

    tier = "host"

    def __init__(self, entry: ChunkEntry, unpin: Callable[[], None]) -> None:
        self._entry = entry
        self._unpin: Callable[[], None] | None = unpin
        self.num_tokens = entry.num_tokens
        self.num_layers = entry.k.shape[0]
        self.num_bytes = entry.num_bytes

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `StoredChunk`."""
        check_layer(layer, self.num_layers)
        return self._entry.k[layer], self._entry.v[layer]

    def close(self) -> None:
        """See `StoredChunk`."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def __enter__(self) -> HostChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_slow(tier: str) -> bool:
    """Whether a tier is slower than host memory."""
    return tier not in ("device", "host")


def check_layer(layer: int, num_layers: int) -> None:
    """Refuses a layer that there is not.

    Raises:
        IndexError: by number.
    """
    if not 0 <= layer < num_layers:
        raise IndexError(f"layer must be in [0, {num_layers - 1}], got {layer}")
