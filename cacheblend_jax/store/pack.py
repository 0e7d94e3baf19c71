"""One pack: an Orbax checkpoint of one or several entries, with `entries.json` beside them; written once, then read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.location import is_local
from cacheblend_jax.store.record import (
    FORMAT_VERSION,
    DamagedRecordError,
    EntryRecord,
    OtherVersionError,
    canonical_json,
    checksum,
    crc32c_of_bytes,
    record_from_json,
    record_of,
    record_to_json,
    storage_name,
)

RECORDS_FILE = "entries.json"
# Larger files hold array data, whose every layer has a checksum, and OCDBT nodes, which carry their own.
MOST_CHECKED_BYTES = 2**20
# Not damage: the entry may read well later.
PASSING_ERRORS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")


class UnreadableError(Exception):
    """An entry could not be read for a reason that says nothing about its bytes: permissions, too many open files."""


class PackContents(NamedTuple):
    """What `entries.json` says: the records, and `(path, bytes, CRC32C or None)` of every other file."""

    records: list[EntryRecord]
    files: list[tuple[str, int, int | None]]


def write_pack(path: Any, entries: Sequence[tuple[str, ChunkEntry]]) -> list[EntryRecord]:
    """Writes entries as a pack at `path`, which must not exist. Nothing waits for the disk: see docs/store-format.md.

    One entry is the tree `{k, v}`, several are `{name: {k, v}}` with their storage names.
    """
    from cacheblend_jax.store.orbax_write import save_tree  # Orbax takes a quarter of a second to import

    alone = len(entries) == 1
    created = time.time()
    names = ["" if alone else storage_name(key) for key, _ in entries]
    trees = {name: {"k": entry.k, "v": entry.v} for name, (_, entry) in zip(names, entries, strict=True)}
    save_tree(path, trees[""] if alone else trees)
    records = [record_of(*item, name, created) for name, item in zip(names, entries, strict=True)]
    body = {
        "version": FORMAT_VERSION,
        "entries": [record_to_json(record) for record in records],
        "files": [[name, file.stat().length, _file_checksum(file)] for name, file in files_of(path)],
    }
    text = canonical_json({"crc32c": crc32c_of_bytes(canonical_json(body)), "pack": body})
    (path / RECORDS_FILE).write_bytes(text)
    return records


def read_contents(path: Any) -> PackContents:
    """Reads a pack's `entries.json`.

    Raises:
        OSError: there is none.
        DamagedRecordError, OtherVersionError: it is not as it was written, or of another format version.
    """
    text = (path / RECORDS_FILE).read_bytes()
    try:
        value = json.loads(text)
        body = value["pack"]
        version = body["version"]
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise OtherVersionError(f"format version {version}; this code reads version {FORMAT_VERSION}")
        intact = text == canonical_json(value) and value["crc32c"] == crc32c_of_bytes(canonical_json(body))
        if not intact:
            raise DamagedRecordError(f"{RECORDS_FILE} has a wrong checksum")
        files = [(str(name), int(size), crc) for name, size, crc in body["files"]]
        return PackContents([record_from_json(record) for record in body["entries"]], files)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedRecordError(f"{RECORDS_FILE} cannot be read: {error!r}") from error


def file_problems(path: Any, contents: PackContents) -> list[str]:
    """Says which files of a pack are missing, of another size, changed, or too many."""
    problems = []
    present = dict(files_of(path))
    for name, size, crc in contents.files:
        file = present.pop(name, None)
        if file is None:
            problems.append(f"{name} is missing")
        elif file.stat().length != size:
            problems.append(f"{name} has {file.stat().length} bytes, {size} were written")
        elif crc is not None and crc32c_of_bytes(file.read_bytes()) != crc:
            problems.append(f"{name} has a wrong checksum")
    return problems + [f"{name} does not belong to the pack" for name in present]


def files_of(path: Any) -> list[tuple[str, Any]]:
    """Returns the relative name and the path of every file of a pack but `entries.json`, in order."""
    found = []
    waiting = [("", path)]
    while waiting:
        prefix, directory = waiting.pop()
        for child in directory.iterdir():
            name = prefix + child.name
            if child.is_dir():
                waiting.append((name + "/", child))
            elif name != RECORDS_FILE:
                found.append((name, child))
    return sorted(found)


def size_of(path: Any) -> int:
    """Bytes of a pack's files."""
    return sum(file.stat().length for _, file in files_of(path)) + (path / RECORDS_FILE).stat().length


class EntryReader:
    """Reads one entry of a pack through TensorStore: whole, or layer by layer. Safe to use from several threads.

    Args:
        pack: the pack's directory, or the TensorStore spec of a key-value store that holds its `state/`.
    """

    def __init__(self, pack: Any, record: EntryRecord) -> None:
        self.record = record
        base = pack if isinstance(pack, dict) else base_spec(pack)
        prefix = f"{record.tree}." if record.tree else ""
        opening = [ts.open(_array_spec(base, prefix + name), context=tensorstore_context(), read=True) for name in "kv"]
        self._k, self._v = (self._checked(_result(future)) for future in opening)

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns K and V of one layer, each `[tokens, kv_heads, head_dim]`, checked.

        Raises:
            DamagedEntryError, UnreadableError: why not.
        """
        reading = [array[layer].read() for array in (self._k, self._v)]
        k, v = (np.asarray(_result(future)) for future in reading)
        if checksum(k) != self.record.crc_k[layer] or checksum(v) != self.record.crc_v[layer]:
            raise DamagedEntryError(f"layer {layer} of entry {self.record.key} has a wrong checksum")
        return k, v

    def read(self) -> ChunkEntry:
        """Returns the whole entry, checked; errors as `read_layer`."""
        record = self.record
        k, v = (np.empty(record.shape, record.dtype) for _ in range(2))
        reading = [
            [ts.array(out[layer]).write(array[layer]) for layer in range(record.shape[0])]
            for out, array in ((k, self._k), (v, self._v))
        ]
        for out, futures, crcs in zip((k, v), reading, (record.crc_k, record.crc_v), strict=True):
            for layer, (future, crc) in enumerate(zip(futures, crcs, strict=True)):
                _result(future)  # while the later layers are still on their way, this one is checked
                if checksum(out[layer]) != crc:
                    raise DamagedEntryError(f"layer {layer} of entry {record.key} has a wrong checksum")
        return ChunkEntry(k, v, record.fingerprint, record.context_ids)

    def _checked(self, array: ts.TensorStore) -> ts.TensorStore:
        shape, dtype = tuple(array.shape), array.dtype.name
        if shape != self.record.shape or dtype != self.record.dtype:
            raise DamagedEntryError(
                f"entry {self.record.key} is {dtype}{list(shape)}, {self.record.dtype}{list(self.record.shape)} was "
                "written"
            )
        return array


def _file_checksum(file: Any) -> int | None:
    return crc32c_of_bytes(file.read_bytes()) if file.stat().length <= MOST_CHECKED_BYTES else None


def base_spec(path: Any) -> Any:
    """Returns TensorStore's spec of the key-value store that holds a pack's `state/`."""
    if is_local(path):
        return {"driver": "file", "path": f"{os.path.abspath(path)}/state/"}
    url = f"{os.fspath(path)}/state/"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url.startswith("s3://") or not endpoint:
        return url
    # A server that is not Amazon's: other S3 clients know of it by this variable, TensorStore by its spec alone.
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": prefix, "endpoint": endpoint, "aws_region": region}


def _array_spec(base: Any, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#nodes"},
        "path": name,
        "open": True,
        "recheck_cached_data": "open",
        "fill_missing_data_reads": False,  # a layer that is missing is damage, not zeros
    }


@cache
def tensorstore_context() -> ts.Context:
    """Array data is not cached (the host tier does that); the B-tree nodes of packs are, in 64 MiB."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#nodes": {"total_bytes_limit": 2**26}})


def _result(future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, OverflowError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, PermissionError) or any(name in text for name in PASSING_ERRORS):
            raise UnreadableError(text) from error
        raise DamagedEntryError(f"an entry cannot be read: {text.splitlines()[0] if text else error!r}") from error
