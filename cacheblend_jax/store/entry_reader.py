"""Reads entries out of packs through TensorStore: whole, a layer at a time or some of its heads. Checks every byte."""

from __future__ import annotations

import os
import time
from collections import deque
from functools import cache
from typing import Any

import numpy as np
import tensorstore as ts

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.head_groups import cut, head_axis
from cacheblend_jax.store.kvstore import KvStoreSpec, base_spec
from cacheblend_jax.store.quantise import Scales
from cacheblend_jax.store.record import EntryRecord, checksum
from cacheblend_jax.store.stored_chunk import StoredRows

LAYERS_AHEAD = 4  # that are being read while one is checked

# What is in TensorStore's messages of errors that are not damage: the entry may be readable later. Whatever the system,
# the network or a server answers is such an error, and has its code in the message; that a file is missing or too short
# has none, except where a server says that an object ends before the range that is to be read.
TRANSIENT_ERRORS = (
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
    "[os_error_code=",
    "[curl_code=",
    "[http_response_code=",
)
TOO_SHORT = "[http_response_code='416']"
# Of requests to a server. A request's look-up waits for them, and by default would do so for minutes.
RETRIES = {"max_retries": 3, "initial_delay": "100ms", "max_delay": "1s"}


class UnreadableError(Exception):
    """An entry could not be read for a reason that says nothing of its bytes: permissions, a failing disk or server."""


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
        self._stored = record.arrays()
        self._arrays = {name: self._checked(name, _result(future)) for name, future in opening.items()}
        self._opened = time.time()

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """Returns K and V of one layer, as `StoredChunk.read_layer` does.

        Raises:
            DamagedEntryError: a checksum is wrong, or data is missing.
            UnreadableError: the layer cannot be read now.
        """
        num_groups, kv_heads = self.record.groups, self.record.shape[2]
        each = kv_heads // num_groups
        groups = range(num_groups) if heads is None else range(heads.start // each, -(-heads.stop // each))
        read = self._finish(layer, groups, self._begin(layer, groups))
        if heads is not None:
            among = range(heads.start - groups.start * each, heads.stop - groups.start * each)
            read = {name: cut(array, name, among) for name, array in read.items()}
        return self._entry({name: array[None] for name, array in read.items()}).layer(0)

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        num_layers, groups = self.record.shape[0], range(self.record.groups)
        whole = {name: np.empty(array.shape, array.dtype) for name, array in self._stored.items()}
        reading = deque(self._begin(layer, groups) for layer in range(min(LAYERS_AHEAD, num_layers)))
        for layer in range(num_layers):
            begun = reading.popleft()
            if layer + LAYERS_AHEAD < num_layers:
                reading.append(self._begin(layer + LAYERS_AHEAD, groups))
            for name, array in self._finish(layer, groups, begun).items():
                whole[name][layer] = array
        return self._entry(whole)

    def _begin(self, layer: int, groups: range) -> dict[str, Any]:
        """Begins to read some groups of a layer's heads: all by the array, others as a range of bytes."""
        if len(groups) == self.record.groups:
            return {name: self._heads_first(name, array[layer]).read() for name, array in self._arrays.items()}
        return {name: self._begin_range(name, array, layer, groups) for name, array in self._arrays.items()}

    def _begin_range(self, name: str, array: ts.TensorStore, layer: int, groups: range) -> Any:
        size = self._stored[name].group_bytes
        chunk = "/".join(["c", str(layer), *["0"] * (array.rank - 1)])  # of the array's storage; see `orbax_write`
        wanted = slice(groups.start * size, groups.stop * size)
        kvstore: Any = array.kvstore  # the array's own, so that it has the nodes in memory already
        return kvstore.read(chunk, byte_range=wanted, staleness_bound=self._opened)

    def _heads_first(self, name: str, layer: ts.TensorStore) -> ts.TensorStore:
        """Returns a layer with its axes as they are stored, so that reading it is one copy."""
        axis = head_axis(name) if self.record.groups > 1 else 0
        return layer.transpose([axis, *(other for other in range(layer.rank) if other != axis)]) if axis else layer

    def _finish(self, layer: int, groups: range, begun: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns what was read of a layer, with the array's axes, once it is there and checked."""
        read = {name: self._bytes_of(name, _result(future), len(groups)) for name, future in begun.items()}
        for name, array in read.items():
            stored = self._stored[name]
            parts = array.reshape(len(groups), -1)
            first = layer * stored.groups
            crcs = stored.crcs[first + groups.start : first + groups.stop]
            if any(checksum(part) != crc for part, crc in zip(parts, crcs, strict=True)):
                raise DamagedEntryError(f"layer {layer} of entry {self.record.key} has a wrong checksum")
        if self.record.groups == 1:
            return read
        return {name: array.swapaxes(0, head_axis(name)) for name, array in read.items()}

    def _bytes_of(self, name: str, result: Any, num_groups: int) -> np.ndarray:
        """Returns an array, heads first, of what TensorStore read: an array already, or a range of bytes."""
        if not isinstance(result, ts.KvStore.ReadResult):
            return np.asarray(result)
        stored, value = self._stored[name], result.value  # a copy each time
        if len(value) != num_groups * stored.group_bytes:
            raise DamagedEntryError(f"{name} of entry {self.record.key} lacks data")
        (_, *shape), axis = stored.shape, head_axis(name)
        heads = shape.pop(axis) // stored.groups * num_groups
        return np.frombuffer(value, stored.dtype).reshape(heads, *shape)

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
    """Returns a context that caches the B-tree nodes of packs, in 64 MiB, not array data: the host tier does that.

    Of a server that does not answer, it lets go within seconds.
    """
    caches = {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#nodes": {"total_bytes_limit": 2**26}}
    return ts.Context(caches | {"s3_request_retries": RETRIES, "gcs_request_retries": RETRIES})


def _result(future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, OverflowError, RuntimeError) as error:
        text = str(error)
        transient = any(part in text for part in TRANSIENT_ERRORS) and TOO_SHORT not in text
        if isinstance(error, PermissionError) or transient:
            raise UnreadableError(text) from error
        raise DamagedEntryError(f"an entry cannot be read: {text.splitlines()[0] if text else error!r}") from error
