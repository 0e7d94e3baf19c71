"""One pack: an Orbax checkpoint of one or several entries, and the `entries.json` beside it that describes them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.record import (
    FORMAT_VERSION,
    MALFORMED,
    DamagedRecordError,
    EntryRecord,
    canonical_json,
    check_version,
    crc32c_of_bytes,
    record_from_json,
    record_of,
    record_to_json,
    storage_name,
)

RECORDS_FILE = "entries.json"
# Larger files hold array data, whose layers have checksums of their own, and OCDBT nodes, which carry theirs.
MAX_CHECKED_BYTES = 2**20


class PackContents(NamedTuple):
    """What `entries.json` says: the records, and `(path, bytes, CRC32C or None)` of every other file."""

    records: list[EntryRecord]
    files: list[tuple[str, int, int | None]]


def write_pack(path: epath.Path, entries: Sequence[QueuedEntry], salt: str) -> list[EntryRecord]:
    """Writes entries as a pack and returns their records. Nothing is synced to the disk: see docs/store-format.md.

    A single entry is the tree `{k, v}`, several are `{name: {k, v}}` by their storage names. Quantised ones have
    `k_scales` and `v_scales` too, and perhaps `k_offset`. The format version is the highest that an entry needs.

    Args:
        path: the pack's directory, which must not exist.
        salt: of the store, as `salt_hash` gives it.

    Raises:
        OSError, ValueError: as the file system or TensorStore report (disk full, no permission).
    """
    from cacheblend_jax.store.orbax_write import save_tree  # importing Orbax takes a quarter of a second

    alone = len(entries) == 1
    created = time.time()
    names = ["" if alone else storage_name(queued.key, salt) for queued in entries]
    trees = {name: queued.entry.arrays() for name, queued in zip(names, entries, strict=True)}
    save_tree(path, trees[""] if alone else trees)
    records = [record_of(queued, name, created, salt) for name, queued in zip(names, entries, strict=True)]
    body = {
        "version": max([FORMAT_VERSION, *(record.version for record in records)]),
        "entries": [record_to_json(record) for record in records],
        "files": [[name, file.stat().length, _file_checksum(file)] for name, file in files_of(path)],
    }
    text = canonical_json({"crc32c": crc32c_of_bytes(canonical_json(body)), "pack": body})
    (path / RECORDS_FILE).write_bytes(text)
    return records


def read_contents(path: epath.Path) -> PackContents:
    """Reads a pack's `entries.json`.

    Raises:
        OSError: there is none, or it cannot be read.
        DamagedRecordError: it is not as it was written.
        OtherVersionError: it is of another format version.
    """
    text = (path / RECORDS_FILE).read_bytes()
    try:
        value = json.loads(text)
        body = value["pack"]
        check_version(body["version"])
        intact = text == canonical_json(value) and value["crc32c"] == crc32c_of_bytes(canonical_json(body))
        if not intact:
            raise DamagedRecordError(f"{RECORDS_FILE} has a wrong checksum")
        files = [(str(name), int(size), crc) for name, size, crc in body["files"]]
        return PackContents([record_from_json(record) for record in body["entries"]], files)
    except MALFORMED as error:
        raise DamagedRecordError(f"{RECORDS_FILE} cannot be read: {error!r}") from error


def file_problems(path: epath.Path, contents: PackContents) -> list[str]:
    """Says which files of a pack are missing, of another size, changed, or foreign to it."""
    problems = []
    present = dict(files_of(path))
    for name, size, crc in contents.files:
        file = present.pop(name, None)
        if file is None:
            problems.append(f"{name} is missing")
        elif file.stat().length != size:
            problems.append(f"{name} has {file.stat().length} bytes, but {size} were written")
        elif crc is not None and crc32c_of_bytes(file.read_bytes()) != crc:
            problems.append(f"{name} has a wrong checksum")
    return problems + [f"{name} does not belong to the pack" for name in present]


def files_of(path: epath.Path) -> list[tuple[str, epath.Path]]:
    """Returns the relative name and the path of every file of a pack except `entries.json`, sorted by name."""
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


def size_of(path: epath.Path) -> int:
    """Returns the bytes of all files of a pack."""
    return sum(file.stat().length for _, file in files_of(path)) + (path / RECORDS_FILE).stat().length


def _file_checksum(file: epath.Path) -> int | None:
    return crc32c_of_bytes(file.read_bytes()) if file.stat().length <= MAX_CHECKED_BYTES else None
