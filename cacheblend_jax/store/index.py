"""The index of a store's directory: which pack holds which entry. SQLite in WAL mode, shared by processes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

from cacheblend_jax.store.index_file import (
    BUSY_CODES,
    BUSY_SECONDS,
    COMPLETE,
    INDEX_ERRORS,
    SCHEMA,
    check,
    connected,
    identity_of,
    state_of,
    statements,
)
from cacheblend_jax.store.record import (
    EntryRecord,
    content_of,
    dump_record,
    storage_name,
    usable_record,
)

PROTECTED = 0.8  # of the capacity may hold entries seen twice; the least recent of them count as seen once then


class Found(NamedTuple):
    """An entry's place: `record` and `crc` are for `load_record`; `uses` counts how often it was seen."""

    pack: str
    record: bytes
    crc: int
    uses: int


class Listed(NamedTuple):
    """An entry as `ls` shows it; `used` is the time of its last use, in milliseconds since 1970."""

    name: str
    pack: str
    size: int
    uses: int
    used: int
    record: bytes
    crc: int


class Index:
    """Entries and packs of one directory.

    A pack is `writing` (its bytes are reserved), `ready`, or `dead` (no entry left, its files are to be removed).
    Times of use never go backwards, whatever the clock does.

    Args:
        path: the database's file, or `None`: in memory, for a directory that cannot hold one.
        read_only: open one that cannot be written, and is not changed here.

    Attributes:
        identity: device and inode of the file.

    Raises:
        sqlite3.Error: it cannot be opened, or is not an index of this version (`sqlite3.DatabaseError`).
    """

    def __init__(self, path: str | None, *, read_only: bool = False) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None  # of a file that was opened as one that nobody changes
        self._lock = self._reading_lock = threading.RLock()
        self.identity: tuple[int, int] | None = None
        if read_only:
            self._connect_to_read()
            return
        self._writing = self._reading = connected(path)
        try:
            self._set_up()
            # Looking up never waits for another process's writing. One in memory has a single connection.
            if path is not None:
                self._reading, self._reading_lock = connected(path), threading.RLock()
            check(self._reading)
        except BaseException:
            self.close()
            raise
        if path is not None:
            self.identity = identity_of(path)

    def _connect_to_read(self) -> None:
        """Connects who may not write: to a database that others write where SQLite can, else to a file at rest."""
        assert self._path is not None
        seen = None
        try:
            connection = connected(self._path, "mode=ro")
        except INDEX_ERRORS:  # it needs files beside it then that are not there, and cannot be made
            seen = state_of(self._path)
            connection = connected(self._path, "mode=ro&immutable=1")
        self._writing = self._reading = connection
        self._seen = seen

    def _set_up(self) -> None:
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._make_tables()
            except sqlite3.OperationalError as error:  # WAL mode is refused at once while others open the file
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in BUSY_CODES or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _make_tables(self) -> None:
        if self._path is not None:
            self._writing.execute("PRAGMA journal_mode = WAL")
            self._writing.execute("PRAGMA synchronous = NORMAL")
        with self._transaction() as run:
            if not run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in statements(SCHEMA):
                    run(statement)

    def is_complete(self) -> bool:
        """Whether every pack that was there when the index was made has been entered."""
        with self._read() as run:
            return run("PRAGMA application_id").fetchone()[0] == COMPLETE

    def mark_complete(self) -> None:
        """Notes for all later openings that `is_complete`."""
        with self._transaction() as run:
            run(f"PRAGMA application_id = {COMPLETE}")

    @contextmanager
    def _read(self) -> Iterator:
        with self._reading_lock:
            if self._seen is not None and self._path is not None and self._seen != state_of(self._path):
                old = self._reading
                self._connect_to_read()
                old.close()
            yield self._reading.execute

    @contextmanager
    def _transaction(self) -> Iterator:
        with self._lock:
            self._writing.execute("BEGIN IMMEDIATE")
            try:
                yield self._writing.execute
            except BaseException:
                self._writing.execute("ROLLBACK")
                raise
            self._writing.execute("COMMIT")

    def close(self) -> None:
        """Closes the database."""
        for lock, connection in ((self._reading_lock, self._reading), (self._lock, self._writing)):
            with lock, closing(connection):
                pass

    def find(self, name: str) -> Found | None:
        """Looks an entry up by its storage name."""
        sql = "SELECT p.name, e.record, e.crc, e.uses FROM entries e JOIN packs p ON p.id = e.pack WHERE e.name = ?"
        with self._read() as run:
            row = run(sql, (bytes.fromhex(name),)).fetchone()
        if row is None:
            return None
        pack, record, crc, uses = row
        return Found(str(pack), record, crc, uses if isinstance(uses, int) else 1)

    def totals(self) -> tuple[int, int]:
        """Returns the bytes of all packs, and the number of entries."""
        with self._read() as run:
            size, entries = run("SELECT bytes, entries FROM totals").fetchone()
        if not isinstance(size, int) or not isinstance(entries, int):
            raise sqlite3.DatabaseError("the totals are not numbers")
        return size, entries

    def listed(self, pack: str | None = None) -> list[Listed]:
        """Returns all entries, or a pack's, the least recently used first."""
        sql = """SELECT lower(hex(e.name)), p.name, e.bytes, e.uses, e.used, e.record, e.crc
            FROM entries e JOIN packs p ON p.id = e.pack WHERE ? IS NULL OR p.name = ? ORDER BY e.used, e.rowid"""
        with self._read() as run:
            return [Listed(*row) for row in run(sql, (pack, pack))]

    def packs(self, state: str) -> list[str]:
        """Returns the names of the packs in a state."""
        with self._read() as run:
            return [name for (name,) in run("SELECT name FROM packs WHERE state = ?", (state,))]

    def reserve(self, pack: str, size: int) -> None:
        """Notes a pack that is about to be written, so that its bytes count."""
        with self._transaction() as run:
            run("INSERT INTO packs(name, state, bytes, used) VALUES(?, 'writing', ?, ?)", (pack, size, _tick(run)))

    def add(
        self,
        pack: str,
        size: int,
        records: Sequence[EntryRecord],
        *,
        adopt: bool = False,
        uses: dict[str, int] | None = None,
    ) -> int:
        """Makes a written pack's entries known, all at once; returns how many of them it now holds.

        An entry that is known already with the same checksums stays where it is; with others it moves here. Packs that
        are left empty are dead. `uses` says by key how often entries were seen, if not once. To `adopt` a pack that was
        found moves no entry, and changes nothing where the pack has become known meanwhile: what was removed since
        would come back.
        """
        with self._transaction() as run:
            known = run("SELECT id, state FROM packs WHERE name = ?", (pack,)).fetchone()
            if adopt and known is not None and known[1] != "writing":
                return run("SELECT count(*) FROM entries WHERE pack = ?", (known[0],)).fetchone()[0]
            run("INSERT OR IGNORE INTO packs(name, state, bytes, used) VALUES(?, 'ready', 0, ?)", (pack, _tick(run)))
            run("UPDATE packs SET state = 'ready', bytes = ? WHERE name = ?", (size, pack))
            (number, used) = run("SELECT id, used FROM packs WHERE name = ?", (pack,)).fetchone()
            left = set()
            for record in records:
                name = bytes.fromhex(storage_name(record.key))
                text, crc = dump_record(record)
                old = run("SELECT pack, record, crc FROM entries WHERE name = ?", (name,)).fetchone()
                if old is not None:
                    if adopt or _same_content(old[1], old[2], record):
                        continue
                    left.add(old[0])
                    run("DELETE FROM entries WHERE name = ?", (name,))
                run(
                    "INSERT INTO entries VALUES(?, ?, ?, ?, ?, ?, ?)",
                    (name, number, (uses or {}).get(record.key, 1), used, record.num_bytes, text, crc),
                )
            _bury_empty(run, left | {number})
            return run("SELECT count(*) FROM entries WHERE pack = ?", (number,)).fetchone()[0]

    def touch(self, seen: dict[str, int]) -> None:
        """Counts entries as seen so many times more, in the order given."""
        with self._transaction() as run:
            tick = _tick(run)
            for name, count in seen.items():
                key = bytes.fromhex(name)
                run("UPDATE entries SET uses = uses + ?, used = ? WHERE name = ?", (count, tick, key))
                run(
                    """UPDATE packs SET used = ?, hot = max(hot, (SELECT uses >= 2 FROM entries WHERE name = ?))
                    WHERE id = (SELECT pack FROM entries WHERE name = ?)""",
                    (tick, key, key),
                )
                tick += 1

    def remove(self, names: Iterable[str], pack: str | None = None) -> int:
        """Forgets entries, or those of them that are in `pack`; packs left empty are dead. Returns how many."""
        count = 0
        with self._transaction() as run:
            left = set()
            for name in names:
                key = bytes.fromhex(name)
                row = run(
                    "SELECT e.pack, p.name FROM entries e LEFT JOIN packs p ON p.id = e.pack WHERE e.name = ?", (key,)
                ).fetchone()
                if row is not None and pack in (None, row[1]):
                    left.add(row[0])
                    run("DELETE FROM entries WHERE name = ?", (key,))
                    count += 1
            _bury_empty(run, left)
        return count

    def bury(self, pack: str) -> int:
        """Forgets the entries of a pack, which is dead then; returns how many there were."""
        with self._transaction() as run:
            deleted = run("DELETE FROM entries WHERE pack = (SELECT id FROM packs WHERE name = ?)", (pack,)).rowcount
            run("UPDATE packs SET state = 'dead' WHERE name = ?", (pack,))
        return deleted

    def forget_pack(self, pack: str, state: str) -> None:
        """Forgets a pack whose files are gone, if it is in this state: its bytes count no more."""
        with self._transaction() as run:
            run("DELETE FROM packs WHERE name = ? AND state = ?", (pack, state))

    def candidates(self, capacity: int) -> list[str]:
        """Returns the ready packs in the order in which they are to be evicted.

        Packs of entries seen once come first, then those of entries seen twice, each by their last use. Where the
        latter hold more than four fifths of the capacity, the least recent of them count as seen once again.
        """
        with self._transaction() as run:
            (hot_bytes,) = run("SELECT hot_bytes FROM totals").fetchone()
            sql = "SELECT id, bytes FROM packs WHERE state = 'ready' AND hot = 1 ORDER BY used"
            for number, size in run(sql).fetchall() if hot_bytes > PROTECTED * capacity else []:
                if hot_bytes <= PROTECTED * capacity:
                    break
                run("UPDATE packs SET hot = 0 WHERE id = ?", (number,))
                hot_bytes -= size
            return [
                name for (name,) in run("SELECT name FROM packs WHERE state = 'ready' ORDER BY hot, used LIMIT 256")
            ]

    def recount(self) -> None:
        """Takes the totals anew from the rows."""
        with self._transaction() as run:
            run(
                """UPDATE totals SET bytes = (SELECT ifnull(sum(bytes), 0) FROM packs),
                hot_bytes = (SELECT ifnull(sum(bytes * hot), 0) FROM packs), entries = (SELECT count(*) FROM entries)"""
            )

    def problems(self) -> list[str]:
        """Returns what SQLite finds wrong with the database."""
        with self._read() as run:
            return [text for (text,) in run("PRAGMA integrity_check") if text != "ok"]


def _tick(run) -> int:
    """Returns milliseconds since 1970, or more where the clock went backwards: later than every use so far."""
    (latest,) = run("SELECT max(used) FROM packs").fetchone()
    return max(time.time_ns() // 10**6, (latest or 0) + 1)


def _bury_empty(run, packs: Iterable[int]) -> None:
    for number in packs:
        run(
            "UPDATE packs SET state = 'dead' WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entries WHERE pack = ?)",
            (number, number),
        )


def _same_content(text: bytes, crc: int, record: EntryRecord) -> bool:
    old = usable_record(text, crc, storage_name(record.key))
    return old is not None and content_of(old) == content_of(record)
