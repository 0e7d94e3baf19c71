"""One chunk's KV: on the host, on a device, or queued for the disk."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class ChunkEntry:
    """K before RoPE and V of a chunk computed alone, each `[layers, tokens, kv_heads, head_dim]`, on the host.

    `fingerprint` (the model's) and `context_ids` say what it was computed from and after. A store writes them to disk
    for people to read; it finds entries by key alone.

    Raises:
        ValueError: `k` and `v` differ in shape or dtype, or do not have four dimensions.
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


@dataclass(frozen=True, eq=False)
class DeviceEntry:
    """A `ChunkEntry` in a device's memory: its `num_tokens` rows come first, then padding.

    Compiled programs are specific to a shape; padding lets chunks of many lengths share a few of them.
    """

    k: Float[jax.Array, "layers rows kv_heads head_dim"]
    v: Float[jax.Array, "layers rows kv_heads head_dim"]
    num_tokens: int
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that K and V take on the device, padding included (on each device, where a mesh has copies)."""
        return self.k.nbytes + self.v.nbytes

    def on_host(self) -> ChunkEntry:
        """Copies the entry to the host, without the padding."""
        k, v = (np.array(array[:, : self.num_tokens]) for array in (np.asarray(self.k), np.asarray(self.v)))
        return ChunkEntry(k, v, self.fingerprint, self.context_ids)


@dataclass(frozen=True, eq=False)
class QueuedEntry:
    """An entry to be written to disk, and how many requests have used it so far."""

    key: str
    entry: ChunkEntry
    uses: int = 1
