"""The disk tier: packs of entries in a directory, found through the index, evicted whole, shared by processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from cacheblend_jax.errors import CacheBlendError, DamagedEntryError
from cacheblend_jax.store import recovery
from cacheblend_jax.store.breaker import Breaker
from cacheblend_jax.store.damage import Damage
from cacheblend_jax.store.disk_chunk import DiskChunk, whole
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.entry import ChunkEntry, QueuedEntry
from cacheblend_jax.store.entry_reader import EntryReader, UnreadableError
from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.index import Found, Listed
from cacheblend_jax.store.index_file import INDEX_ERRORS, is_broken
from cacheblend_jax.store.open_packs import HeldPack, OpenPacks
from cacheblend_jax.store.ownership import is_store, is_whole, make_directories
from cacheblend_jax.store.packing import add_pack, bytes_on_disk, grouped
from cacheblend_jax.store.pins import BusyError
from cacheblend_jax.store.places import Places, is_file, is_local, located
from cacheblend_jax.store.read_health import ReadHealth
from cacheblend_jax.store.record import (
    DamagedRecordError,
    EntryRecord,
    OtherVersionError,
    content_of,
    load_record,
    record_of,
    salt_hash,
    storage_name,
    usable_record,
)
from cacheblend_jax.store.space import WRITE_ERRORS, cannot_write, forget_removed, with_space
from cacheblend_jax.store.stats import DiskStats

DEFAULT_BYTES = 64 * 2**30
Result = TypeVar("Result")


class DiskTier:
    """Entries in a directory. Safe to use from several threads; several processes may share it.

    Every read checks bytes and metadata. No failure of the file system raises, except where a method says so: the entry
    is then a miss, and counted.

    Args:
        directory: made if missing; a path of this machine, or one that Orbax and TensorStore accept (`gs://…`).
        capacity: bytes of all packs, with all their files. `None`: 64 GiB, or as much as the directory already holds if
            that is more.
        salt: of the store; entries of others are neither found nor counted nor removed, except to make room.

    Attributes:
        places, index: the directory's; replaced together when the index has to be opened anew.
        log: counts and warnings.
        health: how its reads go.
        capacity: bytes.
        salt: as records have it; see `salt_hash`.

    Raises:
        CacheBlendError: the path is a file, cannot be made, is empty, or has a backslash in it; or the directory has
            other files in it.
    """

    def __init__(self, directory: str | os.PathLike[str], capacity: int | None = None, salt: str = "") -> None:
        root = located(directory)
        if is_file(root):
            raise CacheBlendError(
                f"store {os.fspath(directory)!r} is a file; expected a directory, or a path to make one at"
            )
        self.log = DiskLog(root)
        self.health = ReadHealth(self.log, Breaker())
        self.salt = salt_hash(salt)
        self._open_packs = OpenPacks()
        self._damage = Damage(self.log, self.health)
        self._lock = threading.Lock()
        self._has_replaced_index = False
        local = is_local(root)
        places = Places(root, local, make_directories(root, local, self.log))
        self.index, self.places = recovery.open_index(places, self.log)
        held = self._or_else((0, 0), lambda: self.index.totals())[0] if capacity is None else 0
        self.capacity = max(DEFAULT_BYTES, held) if capacity is None else capacity

    @staticmethod
    def exists(directory: str | os.PathLike[str]) -> bool:
        """Whether there is a store in a directory."""
        root = located(directory)
        return is_store(root, local=is_local(root))

    @property
    def writable(self) -> bool:
        """Whether this process may write in the directory."""
        return self.places.writable

    # --- reading -----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return self._or_else(False, lambda: self._has(self._name(key)))

    def load(self, key: str) -> tuple[ChunkEntry, int] | None:
        """Returns an entry, and how often it has been used; `None` where there is none that can be trusted."""
        chunk = self.open(key)
        return None if chunk is None else whole(chunk)

    def open(self, key: str) -> DiskChunk | None:
        """Returns a handle on an entry, which is not evicted before it is closed; `None` as `load`."""
        return self._or_else(None, lambda: self._open(self._name(key)))

    def keys(self) -> list[str]:
        """Returns the keys of the entries that can be used, the least recently used first."""
        return self._or_else([], self._usable_keys)

    def same_texts(self, text_digests: Collection[str]) -> list[EntryRecord]:
        """Returns the records of the entries of chunks of these texts, whatever model they are for; see `Label`."""
        return self._or_else([], lambda: self._same_texts(text_digests))

    def _name(self, key: str) -> str:
        return storage_name(key, self.salt)

    def _has(self, name: str) -> bool:
        found = self._find(name)
        record = None if found is None else usable_record(found.record, found.crc, name)
        return record is not None and record.salt == self.salt

    def _usable_keys(self) -> list[str]:
        return [record.key for record in self._usable(self._own_rows())]

    def _own_rows(self) -> list[Listed]:
        return self.index.listed(salt=self.salt)

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of the entries that can be used, by key, the least recently used first."""
        return self._or_else({}, lambda: {each.key: each.num_bytes for each in self._usable(self._own_rows())})

    def _same_texts(self, text_digests: Collection[str]) -> list[EntryRecord]:
        return [record for record in self._usable(self._own_rows()) if record.label.text_digest in text_digests]

    def _usable(self, rows: Iterable[Listed]) -> Iterator[EntryRecord]:
        records = (usable_record(row.record, row.crc, row.name) for row in rows)
        return (record for record in records if record is not None and record.salt == self.salt)

    def _find(self, name: str) -> Found | None:
        return None if self._damage.refuses(name) else self.index.find(name)

    def _open(self, name: str) -> DiskChunk | None:
        for attempt in (1, 2):  # an entry may move to another pack between being found and being held
            found = self._find(name)
            record = None if found is None else self._record(name, found)
            if found is None or record is None:
                return None
            try:
                pack = self._open_packs.hold(self.places.pack(found.pack)) if self.places.local else None
            except BusyError:  # being evicted
                return None
            except FileNotFoundError:
                if attempt == 2 and self.writable:  # an index that is only read may be behind the packs
                    self.quarantine(name, found.pack, "its files are gone")
                continue
            return self._open_held(name, found, record, pack)
        return None

    def _record(self, name: str, found: Found) -> EntryRecord | None:
        try:
            record = load_record(found.record, found.crc, name)
            return record if record.salt == self.salt else None
        except DamagedRecordError as error:
            self.quarantine(name, found.pack, str(error))
        except OtherVersionError as error:
            self.log.warn_once(f"an entry is of {error}; it counts as missing", "outdated")
        return None

    def _open_held(self, name: str, found: Found, record: EntryRecord, pack: HeldPack | None) -> DiskChunk | None:
        def damaged(reason: str) -> None:
            self.quarantine(name, found.pack, reason)

        try:
            reader = EntryReader(self.places.pack(found.pack), record)
        except DamagedEntryError as error:
            damaged(str(error))
        except UnreadableError as error:
            self.health.failed(f"an entry cannot be read now: {error}")
        else:
            return DiskChunk(reader, found.uses, pack, self.health, damaged)
        if pack is not None:
            pack.close()
        return None

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[QueuedEntry]) -> None:
        """Writes entries, small ones together. Those that cannot be written are counted, and logged once."""
        fitting = [queued for queued in entries if bytes_on_disk([queued]) <= self.capacity]
        if len(fitting) < len(entries):
            self.log.count("rejected", len(entries) - len(fitting))
        for group in grouped(fitting, self.capacity):
            try:
                self._write_group(group)
            except (CacheBlendError, BusyError, *WRITE_ERRORS) as error:
                self.log.warn_once(f"entries stay in memory only: {_first_line(error)}", "write_errors")

    def _write_group(self, group: Sequence[QueuedEntry]) -> None:
        self._follow_changes()
        fresh = [queued for queued in group if not self._is_written(queued)]
        if not fresh:
            return
        if self.changed(lambda: add_pack(self.places, self.index, self.log, self.capacity, fresh, self.salt)):
            self._damage.mended(self._name(queued.key) for queued in fresh)
            sweep(self.places, self.index)

    def _is_written(self, queued: QueuedEntry) -> bool:
        """Whether the same key is there with the same arrays; or its name is another salt's, whose entry stays.

        An entry that is known to be damaged, and could not be taken out of the index before, is now.
        """
        name = self._name(queued.key)
        if self._damage.refuses(name):
            self.index.remove([name])
        found = self.index.find(name)
        old = None if found is None else usable_record(found.record, found.crc, name)
        if old is None:
            return False
        if old.salt != self.salt:
            return True
        return content_of(old) == content_of(record_of(queued, old.tree, old.created, self.salt))

    def touch(self, uses: dict[str, int]) -> None:
        """Adds to the uses of entries, by key."""
        if not self.writable or not uses:
            return
        try:
            if not recovery.is_replaced(self.places, self.index):
                self.index.touch({self._name(key): count for key, count in uses.items()})
        except (OSError, *INDEX_ERRORS) as error:
            self.log.warn_once(f"uses are not counted: {error}", "write_errors")

    def check_writable(self) -> None:
        """Checks that entries can be written and removed.

        Raises:
            CacheBlendError: they cannot; names the directory.
        """
        if not self.writable:
            raise cannot_write(self.places)

    def count_unwritable(self) -> None:
        """Counts an entry that is not written because `writable` is false, of which opening has said why."""
        self.log.count("unwritable")

    def remove(self, keys: Sequence[str]) -> int:
        """Removes entries; returns how many there were. Errors as `check_writable`."""
        self.check_writable()

        def own() -> list[str]:
            found = [(name, self.index.find(name)) for name in map(self._name, keys)]
            return [name for name, row in found if row is not None and self._owns(row.record, row.crc, name)]

        return self.remove_names(own)

    def remove_names(self, names: Callable[[], list[str]]) -> int:
        """Removes entries by their storage names; returns how many there were. Errors as `changed`."""

        def doomed() -> list[str]:
            chosen = set(names())
            packs = {found.pack for name in chosen if (found := self.index.find(name)) is not None}
            return [pack for pack in packs if chosen.issuperset(row.name for row in self.index.listed(pack))]

        def remove() -> int:
            removed = self.index.remove(names())
            sweep(self.places, self.index)
            return removed

        return self.changed(remove, doomed)

    def clear(self) -> None:
        """Removes every entry of the salt. Errors as `check_writable`."""
        self.check_writable()

        def own() -> list[str]:
            return [row.name for row in self._own_rows() if self._owns(row.record, row.crc, row.name)]

        self.remove_names(own)

    def _owns(self, record: object, crc: object, name: str) -> bool:
        """Whether an entry may be removed: it is of this salt, or of no use to any."""
        usable = usable_record(record, crc, name)
        return usable is None or usable.salt == self.salt

    def close(self) -> None:
        """Closes the index."""
        self.index.close()

    # --- damage ------------------------------------------------------------------------------------------------------

    def quarantine(self, name: str, pack: str, reason: str) -> None:
        """See `Damage.quarantine`."""
        self._damage.quarantine(self.places, self.index, name, pack, reason)

    def _or_else(self, default: Result, look_up: Callable[[], Result]) -> Result:
        """Returns what `look_up` returns, or the default where the index or the file system fails."""
        try:
            return look_up()
        except (*INDEX_ERRORS, OSError) as error:
            self.health.failed(f"entries cannot be looked up: {error}")
            if is_broken(error):
                self.replace_broken_index()
            return default

    def mended(self, action: Callable[[], Result]) -> Result:
        """Returns what `action` returns; where the index is broken, makes it anew and calls it again.

        Raises:
            CacheBlendError: the index cannot be used.
        """
        try:
            try:
                return action()
            except INDEX_ERRORS as error:
                if not (is_broken(error) and self.replace_broken_index()):
                    raise
            return action()
        except INDEX_ERRORS as error:
            raise CacheBlendError(f"the index of store {str(self.places.root)!r} cannot be used: {error}") from error

    def changed(self, action: Callable[[], Result], doomed: Callable[[], Iterable[str]] = tuple) -> Result:
        """As `mended`, for what writes: makes space where there is none, of the packs that are `doomed` first.

        Raises:
            CacheBlendError: the index cannot be used.
            OSError, ValueError, RuntimeError: as `action`.
        """

        def change() -> Result:
            self._follow_changes()
            result, removed = with_space(self.places, self.index, self.log, action, doomed)
            forget_removed(self.index, self.log, removed)
            return result

        return self.mended(change)

    def replace_broken_index(self) -> bool:
        """Makes the index anew from the packs, once in a process; returns whether it did."""
        if not (self.places.local and self.writable):
            return False
        with self._lock:
            if self._has_replaced_index:  # an index that breaks twice in a process is not worth another try
                return False
            self._has_replaced_index = True
        self.index.close()
        self.log.count("damaged")
        try:
            recovery.set_index_aside(self.places, self.index.identity)
            self._reopen_index()
        except (OSError, *INDEX_ERRORS) as error:
            self.log.warn_once(f"the index cannot be made anew: {error}", "read_errors")
            return False
        return True

    def _follow_changes(self) -> None:
        """Makes what others have removed from under us, and opens the index that is there now.

        Raises:
            CacheBlendError: the directory is no store any more.
        """
        root, local = self.places.root, self.places.local
        if not is_whole(root, local=local):
            self.places = replace(self.places, writable=make_directories(root, local, self.log))
        if recovery.is_replaced(self.places, self.index):  # nobody would find what we enter in the old one
            self._reopen_index()

    def _reopen_index(self) -> None:
        """Opens the index that is there now, and enters the packs of ours that it lacks."""
        self.index.close()
        self.index, self.places = recovery.open_index(self.places, self.log)
        if self.writable:
            recovery.adopt_all(self.places, self.index, self.log)

    # --- counting ----------------------------------------------------------------------------------------------------

    def stats(self) -> DiskStats:
        """Returns the counts so far, and what the directory holds now of this salt."""
        size, entries = self._or_else((0, 0), lambda: self.index.totals_of(self.salt))
        return DiskStats(entries=entries, bytes=size, **self.log.counts())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else repr(error)
