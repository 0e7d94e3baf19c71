"""The disk tier: packs of entries in a directory, found through the index, evicted as wholes, shared by processes."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cacheblend_jax.errors import CacheBlendError, DamagedEntryError
from cacheblend_jax.store import quarantine, recovery
from cacheblend_jax.store.disk_chunk import DiskChunk
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.eviction import make_room, sweep
from cacheblend_jax.store.index import Found
from cacheblend_jax.store.index_file import INDEX_ERRORS
from cacheblend_jax.store.location import PACK_NAME, is_local, located
from cacheblend_jax.store.pack import EntryReader, UnreadableError, size_of, write_pack
from cacheblend_jax.store.pins import BusyError, Pin, make_and_hold
from cacheblend_jax.store.record import (
    DamagedRecordError,
    EntryRecord,
    OtherVersionError,
    content_of,
    load_record,
    record_of,
    storage_name,
    usable_record,
)
from cacheblend_jax.store.stats import DiskCounts

logger = logging.getLogger(__name__)
DEFAULT_BYTES = 64 * 2**30
PACK_BYTES = 2**28  # of entries share a pack at most
PACK_OVERHEAD, ENTRY_OVERHEAD = 2**13, 2**11  # bytes reserved for the files of a pack beside the arrays


class DiskTier:
    """Entries in a directory. Safe to use from several threads; several processes may share it.

    A pack is written under `writing/`, renamed into `packs/`, and only then entered in the index: what the
    index names is complete. Every read checks bytes and metadata. Nothing here raises for what the file system does:
    an entry is then a miss, and counted.

    Args:
        directory: made if missing; a path of this machine, or one that Orbax and TensorStore accept (`gs://…`).
        capacity: bytes of all packs, files and all; `None`: 64 GiB, or what is there where that is more.

    Raises:
        CacheBlendError: the path is no directory and cannot be one; or see `located`.
    """

    def __init__(self, directory: str | Path, capacity: int | None = None) -> None:
        self.root = located(directory)
        self.counts = DiskCounts()
        self._lock = threading.Lock()  # of counts, and of what is said once
        self._said: set[str] = set()
        self.first_uses: dict[str, int] = {}  # of entries that are to be written as seen other than once
        self._refused: set[str] = set()  # damaged entries of a directory that cannot be written
        self.local = is_local(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise CacheBlendError(f"store {str(directory)!r} is a file; expected a directory, or a path to make one at")
        self.writable = self._make_directories()
        self.index = recovery.open_index(self)
        self.capacity = max(DEFAULT_BYTES, self._totals()[0]) if capacity is None else capacity

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether there is a store in a directory."""
        return (located(directory) / "packs").is_dir()

    # --- reading -----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        name = storage_name(key)
        with self._reading():
            found = None if name in self._refused else self.index.find(name)
            return found is not None and usable_record(found.record, found.crc, name) is not None
        return False

    def load(self, key: str) -> tuple[ChunkEntry, int] | None:
        """Returns an entry, and how often it was seen before; `None` where there is none that can be trusted."""
        chunk = self.open(key)
        if chunk is None:
            return None
        with chunk:
            try:
                return chunk.read(), chunk.uses
            except DamagedEntryError:
                return None

    def open(self, key: str) -> DiskChunk | None:
        """Returns a handle on an entry, which is not evicted until it is closed; `None` as `load`."""
        name = storage_name(key)
        with self._reading():
            for attempt in range(2):  # an entry may move to another pack between being found and being held
                found = None if name in self._refused else self.index.find(name)
                record = None if found is None else self._record(name, found)
                if found is None or record is None:
                    return None
                try:
                    pin = Pin(self.pack_path(found.pack)) if self.local else None
                except BusyError:  # being evicted
                    return None
                except FileNotFoundError:
                    if attempt and self.writable:  # else this process only knows where it was
                        self.quarantine(name, found.pack, "its files are gone")
                    continue
                return self._open_pinned(name, found, record, pin)
        return None

    def _record(self, name: str, found: Found) -> EntryRecord | None:
        try:
            return load_record(found.record, found.crc, name)
        except DamagedRecordError as error:
            self.quarantine(name, found.pack, str(error))
        except OtherVersionError as error:
            self.say_once(f"store {self.root}: an entry is of {error}; it counts as missing", "outdated")
        return None

    def _open_pinned(self, name: str, found: Found, record: EntryRecord, pin: Pin | None) -> DiskChunk | None:
        try:
            reader = EntryReader(self.pack_path(found.pack), record)
        except DamagedEntryError as error:
            self.quarantine(name, found.pack, str(error))
        except UnreadableError as error:
            self.say_once(f"store {self.root}: an entry cannot be read now: {error}", "read_errors")
        else:
            return DiskChunk(
                reader,
                found.uses,
                pin,
                lambda reason: self.quarantine(name, found.pack, reason),
                lambda reason: self.say_once(f"store {self.root}: an entry cannot be read: {reason}", "read_errors"),
            )
        if pin is not None:
            pin.close()
        return None

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[tuple[str, ChunkEntry]]) -> None:
        """Writes entries, small ones together; what cannot be written is counted and said once."""
        groups: list[list[tuple[str, ChunkEntry]]] = []
        most = min(PACK_BYTES, max(self.capacity // 8, 1))
        size = most
        for key, entry in entries:
            if _reserved([(key, entry)]) > self.capacity:
                self.count("rejected")
                continue
            size += entry.num_bytes
            if size > most:
                groups.append([])
                size = entry.num_bytes
            groups[-1].append((key, entry))
        for group in groups:
            try:
                if recovery.is_replaced(self):  # what is entered in the old one would never be found
                    self._open_index_anew()
                fresh = [(key, entry) for key, entry in group if not self._is_written(key, entry)]
                if fresh:
                    self._write_pack(fresh)
            except (OSError, ValueError, RuntimeError, BusyError, *INDEX_ERRORS) as error:
                self.say_once(f"store {self.root}: entries stay in memory only: {_first_line(error)}", "write_errors")
        for key, _ in entries:
            self.first_uses.pop(key, None)  # of what was not written

    def _is_written(self, key: str, entry: ChunkEntry) -> bool:
        name = storage_name(key)
        found = self.index.find(name)
        old = None if found is None else usable_record(found.record, found.crc, name)
        return old is not None and content_of(old) == content_of(record_of(key, entry, old.tree, old.created))

    def _write_pack(self, entries: Sequence[tuple[str, ChunkEntry]]) -> None:
        pack = uuid.uuid4().hex
        with self._writing_place(pack) as temporary:
            self.index.reserve(pack, _reserved(entries))
            try:
                if not make_room(self):
                    self.count("rejected", len(entries))
                    return
                if self.local and shutil.disk_usage(self.root).free < _reserved(entries):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Orbax would find out half-way
                records = write_pack(temporary, entries)
                size = size_of(temporary)
                if self.local:
                    os.rename(temporary, self.pack_path(pack))
                self.count("written", self.index.add(pack, size, records, uses=self._uses(records)))
            finally:
                self.index.forget_pack(pack, "writing")  # where it did not become ready
            self._refused.difference_update(storage_name(key) for key, _ in entries)
        sweep(self)

    def _uses(self, records: Sequence[EntryRecord]) -> dict[str, int]:
        return {record.key: self.first_uses.pop(record.key, 1) for record in records}

    @contextmanager
    def _writing_place(self, pack: str) -> Iterator[Any]:
        """A place for a pack to be written at; held, so that nobody takes it for a leftover, and cleared afterwards."""
        if not self.local:
            yield self.pack_path(pack)
            return
        outer = self.root / "writing" / pack
        try:
            pin = make_and_hold(outer)
            with pin:
                yield outer / "pack"
                shutil.rmtree(outer, ignore_errors=True)
        except BaseException:
            shutil.rmtree(outer, ignore_errors=True)
            if pack not in self.index.packs("ready"):
                shutil.rmtree(self.pack_path(pack), ignore_errors=True)
            raise

    def touch(self, seen: dict[str, int]) -> None:
        """Counts entries (by key) as seen so many times more."""
        if not self.writable or not seen:
            return
        try:
            self.index.touch({storage_name(key): count for key, count in seen.items()})
        except INDEX_ERRORS as error:
            self.say_once(f"store {self.root}: uses are not counted: {error}", "write_errors")

    def check_writable(self) -> None:
        """Refuses to go on where nothing can be removed.

        Raises:
            CacheBlendError: names the directory.
        """
        if not self.writable:
            raise CacheBlendError(f"store {str(self.root)!r} cannot be written; open it with the right to")

    def remove(self, keys: Sequence[str]) -> int:
        """Removes entries; returns how many there were; errors as `check_writable`."""
        self.check_writable()
        removed = self.index.remove([storage_name(key) for key in keys])
        sweep(self)
        return removed

    def clear(self) -> None:
        """Removes every entry; errors as `check_writable`."""
        self.check_writable()
        for pack in self.index.packs("ready"):
            self.index.bury(pack)
        sweep(self)

    # --- damage ------------------------------------------------------------------------------------------------------

    def quarantine(self, name: str, pack: str, reason: str) -> None:
        """Takes a damaged entry out: its pack moves to `quarantine/`, or a copy (of links) where others live in it."""
        if not self.writable:
            if name not in self._refused:
                self._refused.add(name)
                self.count("damaged")
                logger.warning("store %s: entry %s is damaged and not used: %s", self.root, name[:16], reason)
            return
        try:
            if not self.index.remove([name], pack):
                return  # someone else was faster
            self.count("damaged")
            logger.warning("store %s: entry %s is damaged and quarantined: %s", self.root, name[:16], reason)
            quarantine.keep_pack(self, pack)
        except (OSError, *INDEX_ERRORS) as error:
            self._refused.add(name)
            self.say_once(f"store {self.root}: a damaged entry cannot be quarantined: {error}", "write_errors")

    # --- opening -----------------------------------------------------------------------------------------------------

    def pack_path(self, pack: str) -> Any:
        """Where a pack lies; a name that is not one of ours (the index is damaged) leads nowhere."""
        return self.root / "packs" / (pack if isinstance(pack, str) and PACK_NAME.fullmatch(pack) else "no-pack")

    def close(self) -> None:
        """Closes the index."""
        self.index.close()

    def _make_directories(self) -> bool:
        try:
            for name in ("packs", "quarantine", *(["writing"] if self.local else [])):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not self.root.exists():
                raise CacheBlendError(
                    f"store {str(self.root)!r} cannot be made: {error}; choose another path"
                ) from error
            self.say_once(f"store {self.root}: entries are read, and not written: {error}", None)
            return False
        return not self.local or os.access(self.root, os.W_OK | os.X_OK)

    # --- counting ----------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Returns the counts, and the bytes and entries held, as `StoreStats` names them."""
        size, entries = self._totals()
        with self._lock:
            counts = asdict(self.counts)
        counts |= {f"disk_{name}": counts.pop(name) for name in ("evicted", "rejected")}
        return counts | {"disk_bytes": size, "disk_entries": entries}

    def _totals(self) -> tuple[int, int]:
        with self._reading():
            return self.index.totals()
        return 0, 0

    def keys(self) -> list[str]:
        """Keys of the entries that can be used, the least recently used first."""
        with self._reading():
            return [
                record.key for row in self.index.listed() if (record := usable_record(row.record, row.crc, row.name))
            ]
        return []

    def count(self, what: str, number: int = 1) -> None:
        """Adds to one of the counts."""
        with self._lock:
            setattr(self.counts, what, getattr(self.counts, what) + number)

    def say_once(self, message: str, what: str | None) -> None:
        """Counts what happened, and logs it the first time that this kind of thing does."""
        if what is not None:
            self.count(what)
        with self._lock:
            new = str(what) not in self._said
            self._said.add(str(what))
        if new:
            logger.warning(message)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns errors of the index and of the file system into a miss."""
        try:
            yield
        except (*INDEX_ERRORS, OSError) as error:
            self.say_once(f"store {self.root}: entries cannot be looked up: {error}", "read_errors")
            if type(error) in (
                sqlite3.DatabaseError,
                UnicodeDecodeError,
            ):  # its subclasses say "locked", "closed", "full": not broken
                self._replace_broken_index()

    def _open_index_anew(self) -> None:
        """Opens the index that is there now, with what we entered in the one before."""
        self.index.close()
        self.index = recovery.open_index(self)
        if self.writable:
            recovery.adopt_all(self)

    def _replace_broken_index(self) -> None:
        if not (self.local and self.writable):
            return
        with self._lock:
            if "replaced" in self._said:  # once in a process: an index that breaks again is not worth another try
                return
            self._said.add("replaced")
        self.index.close()
        self.count("damaged")
        try:
            recovery.set_index_aside(self, self.index.identity)
            self._open_index_anew()
        except (OSError, *INDEX_ERRORS) as error:
            self.say_once(f"store {self.root}: the index cannot be made anew: {error}", "read_errors")


def _reserved(entries: Sequence[tuple[str, ChunkEntry]]) -> int:
    return PACK_OVERHEAD + sum(ENTRY_OVERHEAD + entry.num_bytes for _, entry in entries)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else repr(error)
