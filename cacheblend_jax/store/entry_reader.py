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
from cacheblend_jax.store.quantise import Scales
from cacheblend_jax.store.record import EntryRecord, checksum
from cacheblend_jax.store.stored_chunk import StoredRows

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
        opening = {
            name: ts.open(_array_spec(base, prefix + name), context=tensorstore_context(), read=True)
            for name in record.arrays()
        }
        self._arrays = {name: self._checked(name, _result(future)) for name, future in opening.items()}

    def read_layer(self, layer: int) -> tuple[StoredRows, StoredRows]:
        """Returns K and V of one layer, as `StoredChunk.read_layer` does.

        Raises:
            DamagedEntryError: a checksum is wrong, or data is missing.
            UnreadableError: the layer cannot be read now.
        """
        stored = self.record.arrays()
        reading = {name: array[layer].read() for name, array in self._arrays.items()}
        read = {name: np.asarray(_result(future)) for name, future in reading.items()}
        if any(checksum(array) != stored[name].crcs[layer] for name, array in read.items()):
            raise DamagedEntryError(f"layer {layer} of entry {self.record.key} has a wrong checksum")
        return self._entry({name: array[None] for name, array in read.items()}).layer(0)

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        record, stored = self.record, self.record.arrays()
        read = {name: np.empty(array.shape, array.dtype) for name, array in stored.items()}
        reading = {
            name: [ts.array(out[layer]).write(self._arrays[name][layer]) for layer in range(record.shape[0])]
            for name, out in read.items()
        }
        for name, futures in reading.items():
            for layer, (future, crc) in enumerate(zip(futures, stored[name].crcs, strict=True)):
                _result(future)  # later layers are still being read while this one is checked
                if checksum(read[name][layer]) != crc:
                    raise DamagedEntryError(f"layer {layer} of entry {record.key} has a wrong checksum")
        return self._entry(read)

    def _entry(self, read: dict[str, np.ndarray]) -> ChunkEntry:
        record, (k, v) = self.record, (read["k"], read["v"])
        origin = record.fingerprint, record.context_ids, record.label
        if not record.kv_dtype:
            return ChunkEntry(k, v, *origin)
        k, v = (codes.view(record.kv_dtype) for codes in (k, v))
        scales = Scales(record.dtype, read["k_scales"], read["v_scales"])
        return ChunkEntry(k, v, *origin, scales, read.get("k_offset"))

    def _checked(self, name: str, array: ts.TensorStore) -> ts.TensorStore:
        shape, dtype, written = tuple(array.shape), array.dtype.name, self.record.arrays()[name]
        if shape != written.shape or dtype != written.dtype.name:
            raise DamagedEntryError(
                f"{name} of entry {self.record.key} is {dtype}{list(shape)}, but "
                f"{written.dtype.name}{list(written.shape)} was written"
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
