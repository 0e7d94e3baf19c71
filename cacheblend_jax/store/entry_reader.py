"""Reads entries out of packs through TensorStore, a layer at a time or whole, and checks every byte."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import tensorstore as ts

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.kvstore import KvStoreSpec, base_spec
from cacheblend_jax.store.record import EntryRecord, checksum
from cacheblend_jax.store.stored_chunk import Rows

# TensorStore's names of errors that are not damage: the entry may be readable later.
TRANSIENT_ERRORS = (
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
)


class UnreadableError(Exception):
    """An entry could not be read for a reason that says nothing about its bytes: permissions, too many open files."""


class EntryReader:
    """Reads one entry of a pack. Safe to use from several threads.

    Args:
        pack: the pack's directory, or the TensorStore spec of a key-value store that holds its `state/`.

    Raises:
        DamagedEntryError: the arrays are missing, or not of the record's shape and dtype.
        UnreadableError: they cannot be opened now.
    """

    def __init__(self, pack: os.PathLike[str] | dict[str, Any], record: EntryRecord) -> None:
        self.record = record
        base = pack if isinstance(pack, dict) else base_spec(pack)
        prefix = f"{record.tree}." if record.tree else ""
        opening = [ts.open(_array_spec(base, prefix + name), context=tensorstore_context(), read=True) for name in "kv"]
        self._k, self._v = (self._checked(_result(future)) for future in opening)

    def read_layer(self, layer: int) -> tuple[Rows, Rows]:
        """Returns K and V of one layer, each `[tokens, kv_heads, head_dim]`.

        Raises:
            DamagedEntryError: a checksum is wrong, or data is missing.
            UnreadableError: the layer cannot be read now.
        """
        reading = [array[layer].read() for array in (self._k, self._v)]
        k, v = (np.asarray(_result(future)) for future in reading)
        if checksum(k) != self.record.crc_k[layer] or checksum(v) != self.record.crc_v[layer]:
            raise DamagedEntryError(f"layer {layer} of entry {self.record.key} has a wrong checksum")
        return k, v

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        record = self.record
        k, v = (np.empty(record.shape, record.dtype) for _ in range(2))
        reading = [
            [ts.array(out[layer]).write(array[layer]) for layer in range(record.shape[0])]
            for out, array in ((k, self._k), (v, self._v))
        ]
        for out, futures, crcs in zip((k, v), reading, (record.crc_k, record.crc_v), strict=True):
            for layer, (future, crc) in enumerate(zip(futures, crcs, strict=True)):
                _result(future)  # later layers are still being read while this one is checked
                if checksum(out[layer]) != crc:
                    raise DamagedEntryError(f"layer {layer} of entry {record.key} has a wrong checksum")
        return ChunkEntry(k, v, record.fingerprint, record.context_ids, record.label)

    def _checked(self, array: ts.TensorStore) -> ts.TensorStore:
        shape, dtype = tuple(array.shape), array.dtype.name
        if shape != self.record.shape or dtype != self.record.dtype:
            raise DamagedEntryError(
                f"entry {self.record.key} is {dtype}{list(shape)}, but {self.record.dtype}{list(self.record.shape)} "
                "was written"
            )
        return array


def _array_spec(base: KvStoreSpec, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#nodes"},
        "path": name,
        "open": True,
        "recheck_cached_data": "open",
        "fill_missing_data_reads": False,  # a missing layer is damage, not zeros
    }


@cache
def tensorstore_context() -> ts.Context:
    """Returns a context that caches the B-tree nodes of packs, in 64 MiB, not array data: the host tier does that."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#nodes": {"total_bytes_limit": 2**26}})


def _result(future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, OverflowError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, PermissionError) or any(name in text for name in TRANSIENT_ERRORS):
            raise UnreadableError(text) from error
        raise DamagedEntryError(f"an entry cannot be read: {text.splitlines()[0] if text else error!r}") from error
