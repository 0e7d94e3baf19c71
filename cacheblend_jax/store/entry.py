"""One chunk's KV: on the host, on a device, or queued for the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from cacheblend_jax.store.label import UNKNOWN, Label

if TYPE_CHECKING:
    from jax import Array
else:  # who makes entries on a device has JAX; who looks at a directory need not wait until it is imported
    Array = Any


@dataclass(frozen=True, eq=False)
class ChunkEntry:
    """K before RoPE and V of a chunk computed alone, each `[layers, tokens, kv_heads, head_dim]`, on the host.

    A store keeps what it was given, whatever becomes of the caller's arrays: it copies them, except those that are
    read-only and own their memory (see `hand_over`).

    `fingerprint` (the model's), `context_ids` and `label` say what it was computed from and after. A store writes them
    to disk for people to read; it finds entries by key alone.

    Raises:
        ValueError: `k` and `v` differ in shape or dtype, or do not have four dimensions.
    """

    k: np.ndarray
    v: np.ndarray
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()
    label: Label = UNKNOWN

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.ndim != 4 or self.k.dtype != self.v.dtype:
            raise ValueError(
                "k and v must be of one shape [layers, tokens, kv_heads, head_dim] and one dtype, "
                f"got {self.k.dtype}{list(self.k.shape)} and {self.v.dtype}{list(self.v.shape)}"
            )

    def __repr__(self) -> str:
        return f"ChunkEntry({self.k.dtype}{list(self.k.shape)}, {self.label})"

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.k.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V."""
        return self.k.nbytes + self.v.nbytes

    def hand_over(self) -> ChunkEntry:
        """Makes the arrays read-only, so that a store need not copy them, and returns the entry.

        For arrays that the caller has made and has given to nobody who might write them.
        """
        for array in (self.k, self.v):
            array.flags.writeable = False
        return self

    def kept(self) -> ChunkEntry:
        """Returns an entry of the same values that nobody else can write; its arrays are in C order."""
        k, v = (array if _is_safe(array) else _copied(array) for array in (self.k, self.v))
        return self if k is self.k and v is self.v else replace(self, k=k, v=v)


def _is_safe(array: np.ndarray) -> bool:
    """Whether an array can be kept as it is: a view, even one that is read-only, may show memory that others write."""
    owns = type(array) is np.ndarray and array.base is None and not array.flags.writeable
    return owns and array.flags.c_contiguous and array.dtype.isnative


def _copied(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", subok=False)
    copy.flags.writeable = False
    return copy


@dataclass(frozen=True, eq=False)
class DeviceEntry:
    """A `ChunkEntry` in a device's memory: its `num_tokens` rows come first, then padding.

    Compiled programs are specific to a shape; padding lets chunks of many lengths share a few of them.
    """

    k: Float[Array, "layers rows kv_heads head_dim"]
    v: Float[Array, "layers rows kv_heads head_dim"]
    num_tokens: int
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()
    label: Label = UNKNOWN

    def __repr__(self) -> str:
        return f"DeviceEntry({self.k.dtype}{list(self.k.shape)}, {self.num_tokens} tokens, {self.label})"

    @property
    def num_bytes(self) -> int:
        """Bytes that K and V take on the device, padding included (on each device, where a mesh has copies)."""
        return self.k.nbytes + self.v.nbytes

    def on_host(self) -> ChunkEntry:
        """Copies the entry to the host, without the padding."""
        k, v = (np.array(array[:, : self.num_tokens]) for array in (np.asarray(self.k), np.asarray(self.v)))
        return ChunkEntry(k, v, self.fingerprint, self.context_ids, self.label)


@dataclass(frozen=True, eq=False)
class QueuedEntry:
    """An entry to be written to disk.

    Attributes:
        uses: how many requests have used it so far.
        checksums: of the layers of K and of V when the entry was put; `None`: to be computed when it is written.
    """

    key: str
    entry: ChunkEntry
    uses: int = 1
    checksums: tuple[tuple[int, ...], tuple[int, ...]] | None = None
