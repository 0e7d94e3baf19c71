"""One chunk's KV: on the host, on a device, or queued for the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from cacheblend_jax.store.label import UNKNOWN, Label
from cacheblend_jax.store.quantise import FLOAT8, QuantisedRows, Scales, can_quantise, quantise

if TYPE_CHECKING:
    from jax import Array
else:  # who makes entries on a device has JAX; who looks at a directory need not wait until it is imported
    Array = Any


Rows = Float[np.ndarray, "tokens kv_heads head_dim"]


@dataclass(frozen=True, eq=False)
class ChunkEntry:
    """K before RoPE and V of a chunk computed alone, each `[layers, tokens, kv_heads, head_dim]`, on the host.

    A store keeps what it was given, whatever becomes of the caller's arrays: it copies them, except those that are
    read-only and own their memory (see `hand_over`).

    `fingerprint` (the model's), `context_ids` and `label` say what it was computed from and after. A store writes them
    to disk for people to read; it finds entries by key alone.

    Where it has `scales`, `k` and `v` are codes, as a store with a `kv_dtype` keeps them.

    Attributes:
        k_offset: what the keys of all tokens have in common, `[layers, kv_heads, head_dim]` (a model's bias of keys):
            quantising subtracts it first, so that channels with large biases leave the others their precision. Entries
            that are read from disk as values have none: quantised then, they are served as values.

    Raises:
        ValueError: `k` and `v` differ in shape or dtype, or do not have four dimensions; or `k_offset` does not fit.
    """

    k: np.ndarray
    v: np.ndarray
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()
    label: Label = UNKNOWN
    scales: Scales | None = None
    k_offset: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.ndim != 4 or self.k.dtype != self.v.dtype:
            raise ValueError(
                "k and v must be of one shape [layers, tokens, kv_heads, head_dim] and one dtype, "
                f"got {self.k.dtype}{list(self.k.shape)} and {self.v.dtype}{list(self.v.shape)}"
            )
        wanted = (self.k.shape[0], *self.k.shape[2:]), self.dtype
        if self.k_offset is not None and (self.k_offset.shape, self.k_offset.dtype) != wanted:
            raise ValueError(
                f"k_offset must be [layers, kv_heads, head_dim] of k's values, {wanted[1]}{list(wanted[0])}, "
                f"got {self.k_offset.dtype}{list(self.k_offset.shape)}"
            )

    def __repr__(self) -> str:
        return f"ChunkEntry({self.k.dtype}{list(self.k.shape)}, {self.label})"

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.k.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Of K's and V's values."""
        return self.k.dtype if self.scales is None else np.dtype(self.scales.dtype)

    @property
    def kv_dtype(self) -> str | None:
        """Of the codes; `None` where the values are stored as they are."""
        return None if self.scales is None else self.k.dtype.name

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V as they are stored."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what is stored, by name: K and V, or their codes, and then what dequantises them.

        Codes of float8 are shown as the bytes that they are: not everything that reads arrays knows the dtype.
        """
        if self.scales is None:
            return {"k": self.k, "v": self.v}
        k, v = (x.view(np.uint8) if x.dtype.name == FLOAT8 else x for x in (self.k, self.v))
        offset = {} if self.k_offset is None else {"k_offset": self.k_offset}
        return {"k": k, "v": v, "k_scales": self.scales.k, "v_scales": self.scales.v} | offset

    def layer(self, layer: int) -> tuple[Rows | QuantisedRows, Rows | QuantisedRows]:
        """Returns one layer's K and V as they are stored."""
        if self.scales is None:
            return self.k[layer], self.v[layer]
        offset = None if self.k_offset is None else self.k_offset[layer]
        k = QuantisedRows(self.k[layer], self.scales.k[layer], offset)
        return k, QuantisedRows(self.v[layer], self.scales.v[layer])

    def quantised(self, kv_dtype: str | None) -> ChunkEntry:
        """Returns the entry with codes in the place of its values; itself where it has codes, or had better not."""
        if kv_dtype is None or self.scales is not None or not (can_quantise(self.k) and can_quantise(self.v)):
            return self
        k, v = quantise(self.k, kv_dtype, self.k_offset), quantise(self.v, kv_dtype)
        scales = Scales(self.k.dtype.name, k.scales, v.scales)
        return replace(self, k=k.codes, v=v.codes, scales=scales).hand_over()

    def dequantised(self) -> ChunkEntry:
        """Returns the entry with its values in the place of codes; itself where it has values."""
        if self.scales is None:
            return self
        k = QuantisedRows(self.k, self.scales.k, self.k_offset).dequantised(self.dtype)
        v = QuantisedRows(self.v, self.scales.v).dequantised(self.dtype)
        return replace(self, k=k, v=v, scales=None).hand_over()

    def hand_over(self) -> ChunkEntry:
        """Makes the arrays read-only, so that a store need not copy them, and returns the entry.

        For arrays that the caller has made and has given to nobody who might write them.
        """
        for array in self.arrays().values():
            array.flags.writeable = False
        self.k.flags.writeable = self.v.flags.writeable = False  # what `arrays` shows of them may be views
        return self

    def kept(self) -> ChunkEntry:
        """Returns an entry of the same values that nobody else can write; its arrays are in C order."""

        def kept(array: np.ndarray) -> np.ndarray:
            return array if _is_safe(array) else _copied(array)

        scales, offset = self.scales, self.k_offset
        if scales is not None:
            scales = Scales(scales.dtype, kept(scales.k), kept(scales.v))
        offset = None if offset is None else kept(offset)
        return replace(self, k=kept(self.k), v=kept(self.v), scales=scales, k_offset=offset)


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

    k: Shaped[Array, "layers rows kv_heads head_dim"]
    v: Shaped[Array, "layers rows kv_heads head_dim"]
    num_tokens: int
    fingerprint: str = ""
    context_ids: tuple[int, ...] = ()
    label: Label = UNKNOWN
    scales: Scales | None = None
    k_offset: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"DeviceEntry({self.k.dtype}{list(self.k.shape)}, {self.num_tokens} tokens, {self.label})"

    @property
    def num_bytes(self) -> int:
        """Bytes that K and V take on the device, padding included; on a mesh, those of its share on each device."""
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in self._arrays)

    @property
    def whole_bytes(self) -> int:
        """Bytes of K and V, padding included, on whatever devices."""
        return sum(x.nbytes for x in self._arrays)

    @property
    def _arrays(self) -> tuple[Any, ...]:
        return (self.k, self.v) if self.scales is None else (self.k, self.v, self.scales.k, self.scales.v)

    @property
    def dtype(self) -> np.dtype:
        """Of K's and V's values."""
        return np.dtype(self.k.dtype) if self.scales is None else np.dtype(self.scales.dtype)

    @property
    def kv_dtype(self) -> str | None:
        """See `ChunkEntry`."""
        return None if self.scales is None else np.dtype(self.k.dtype).name

    def on_host(self) -> ChunkEntry:
        """Copies the entry to the host, without the padding."""

        def copied(array: Any) -> np.ndarray:
            return np.array(np.asarray(array)[:, : self.num_tokens])

        scales = None if self.scales is None else Scales(self.scales.dtype, *map(copied, self.scales[1:]))
        k, v = copied(self.k), copied(self.v)
        return ChunkEntry(k, v, self.fingerprint, self.context_ids, self.label, scales, self.k_offset)


@dataclass(frozen=True, eq=False)
class QueuedEntry:
    """An entry to be written to disk.

    Attributes:
        uses: how many requests have used it so far.
        checksums: of the layers of each array when the entry was put; `None`: to be computed when it is written.
    """

    key: str
    entry: ChunkEntry
    uses: int = 1
    checksums: dict[str, tuple[int, ...]] | None = None
