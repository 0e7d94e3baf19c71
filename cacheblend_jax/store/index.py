"""The index of a store's directory: which pack holds which entry. SQLite in WAL mode, shared by processes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

from cacheblend_jax.store.index_file import (
    BUSY_CODES,
    BUSY_SECONDS,
    COMPLETE,
    INDEX_ERRORS,
    SALTS,
    SCHEMA,
    check,
    connected,
    has_salts,
    identity_of,
    state_of,
    statements,
)
from cacheblend_jax.store.record import (
    EntryRecord,
    content_of,
    dump_record,
    usable_record,
)

MAX_NUMBER = 253402300799000  # the end of the year 9999, in milliseconds; no size comes near it
CANDIDATES = 256  # for eviction at a time
PROTECTED = 0.8  # of the capacity, at most, for packs with entries used twice
Run = Callable[..., sqlite3.Cursor]  # executes a statement: `sqlite3.Connection.execute`


class Found(NamedTuple):
    """Where an entry is: its pack, its record (for `load_record`) and how often it has been used."""

    pack: str
    record: bytes
    crc: int
    uses: int


class Listed(NamedTuple):
    """A row of the index: an entry, with the time of its last use (`used`) in milliseconds since 1970."""

    name: str
    pack: str
    size: int
    uses: int
    used: int
    record: bytes
    crc: int


class Index:
    """Entries and packs of one directory.

    A pack is `writing` (its bytes are reserved), `ready`, or `dead` (it holds no entries, and its files may go). Times
    of use never go backwards, whatever the clock does. Safe to use from several threads and processes.

    Args:
        path: the database's file; `None`: in memory, for a directory that cannot hold one.
        read_only: open a file that this process may not write.

    Attributes:
        identity: device and inode of the file; `None` where there is none, or it is only read.

    Raises:
        sqlite3.Error: it cannot be opened, or is not an index of this version (`sqlite3.DatabaseError`).
    """

    def __init__(self, path: str | None, *, read_only: bool = False) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None  # state of a file that was opened as one that does not change
        self._lock = self._reading_lock = threading.RLock()
        self.identity: tuple[int, int] | None = None
        if read_only:
            self._connect_to_read()
            return
        self._writing = self._reading = connected(path)
        try:
            self._set_up()
            # A second connection, so that reads never wait for another thread's or process's writes. A database in
            # memory belongs to its one connection.
            if path is not None:
                self._reading, self._reading_lock = connected(path), threading.RLock()
            check(self._reading)
        except BaseException:
            self.close()
            raise
        if path is not None:
            self.identity = identity_of(path)

    def _connect_to_read(self) -> None:
        """Connects without writing: to a database that others may write where SQLite can, or else to a file at rest."""
        assert self._path is not None
        seen = None
        try:
            connection = connected(self._path, "mode=ro")
        except INDEX_ERRORS:  # SQLite needs its files beside the database, which are missing and cannot be made
            seen = state_of(self._path)
            connection = connected(self._path, "mode=ro&immutable=1")
        if not has_salts(connection):
            connection.execute("CREATE TEMP TABLE salted(pack TEXT PRIMARY KEY, salt TEXT NOT NULL)")
        self._writing = self._reading = connection
        self._seen = seen

    def _set_up(self) -> None:
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._make_tables()
            except sqlite3.OperationalError as error:  # SQLite refuses WAL mode at once while others open the file
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in BUSY_CODES or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _make_tables(self) -> None:
        if self._path is not None:
            if self._writing.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                check(self._writing)  # before anything is changed in what may be somebody else's database
            self._writing.execute("PRAGMA journal_mode = WAL")
            self._writing.execute("PRAGMA synchronous = NORMAL")
        with self._transaction() as run:
            new = not run("SELECT count(*) FROM sqlite_master").fetchone()[0]
            missing = SCHEMA + SALTS if new else "" if has_salts(self._writing) else SALTS
            for statement in statements(missing):
                run(statement)

    def is_complete(self) -> bool:
        """Whether the index has every pack that was there when it was made."""
        with self._read() as run:
            return run("PRAGMA application_id").fetchone()[0] == COMPLETE

    def mark_complete(self) -> None:
        """Records, for everyone who opens the index later, that it `is_complete`."""
        with self._transaction() as run:
            run(f"PRAGMA application_id = {COMPLETE}")

    @contextmanager
    def _read(self) -> Iterator[Run]:
        with self._reading_lock:
            if self._seen is not None and self._path is not None and self._seen != state_of(self._path):
                old = self._reading
                self._connect_to_read()
                old.close()
            yield self._reading.execute

    @contextmanager
    def _transaction(self) -> Iterator[Run]:
        with self._lock:
            try:
                self._writing.execute("BEGIN IMMEDIATE")  # waits for others, and may be interrupted then
                yield self._writing.execute
                self._writing.execute("COMMIT")
            except BaseException:
                if self._writing.in_transaction:  # SQLite ends it itself where the disk is full
                    self._writing.execute("ROLLBACK")
                raise

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
            size, entries = run("SELECT bytes, entries FROM totals").fetchone() or (None, None)
        if not isinstance(size, int) or not isinstance(entries, int):
            raise sqlite3.DatabaseError("the totals are not numbers")
        return size, entries

    def totals_of(self, salt: str) -> tuple[int, int]:
        """As `totals`, of the packs and entries of one salt."""
        sql = """SELECT ifnull(sum(p.bytes), 0), ifnull(sum((SELECT count(*) FROM entries WHERE pack = p.id)), 0)
            FROM salted s JOIN packs p ON p.name = s.pack WHERE ? = '' OR s.salt = ?"""
        with self._read() as run:
            size, entries = run(sql, (salt, salt)).fetchone()
        if not isinstance(size, int) or not isinstance(entries, int):
            raise sqlite3.DatabaseError("the totals are not numbers")
        if salt:
            return size, entries
        all_bytes, all_entries = self.totals()
        return all_bytes - size, all_entries - entries

    def listed(self, pack: str | None = None, *, salt: str | None = None) -> list[Listed]:
        """Returns all entries, or those of a pack or of a salt's packs, the least recently used first."""
        sql = """SELECT lower(hex(e.name)), p.name, e.bytes, e.uses, e.used, e.record, e.crc
            FROM entries e JOIN packs p ON p.id = e.pack LEFT JOIN salted s ON s.pack = p.name
            WHERE (?1 IS NULL OR p.name = ?1) AND (?2 IS NULL OR ifnull(s.salt, '') = ?2) ORDER BY e.used, e.rowid"""
        with self._read() as run:
            rows = run(sql, (pack, salt)).fetchall()
        return [
            Listed(str(name), str(pack), _number(size), _number(uses), _number(used), record, crc)
            for name, pack, size, uses, used, record, crc in rows
        ]

    def packs(self, state: str) -> list[str]:
        """Returns the names of the packs in a state."""
        with self._read() as run:
            return [name for (name,) in run("SELECT name FROM packs WHERE state = ?", (state,))]

    def in_order(self) -> list[str]:
        """Returns ready packs in the order of eviction, as `candidates`, but all of them, and without writing."""
        with self._read() as run:
            return [name for (name,) in run("SELECT name FROM packs WHERE state = 'ready' ORDER BY hot, used")]

    def reserve(self, pack: str, size: int, salt: str = "") -> None:
        """Adds a pack of a salt that is about to be written, so that its bytes count already."""
        with self._transaction() as run:
            run("INSERT INTO packs(name, state, bytes, used) VALUES(?, 'writing', ?, ?)", (pack, size, _tick(run)))
            _set_salt(run, pack, salt)

    def add(
        self,
        pack: str,
        size: int,
        records: Sequence[EntryRecord],
        *,
        adopt: bool = False,
        uses: dict[str, int] | None = None,
    ) -> int:
        """Enters a written pack and its entries in one transaction; returns how many entries it now holds.

        An entry that the index already has from another pack stays there if its checksums are the same, and moves here
        otherwise. Packs left without entries are dead.

        Args:
            size: bytes of all its files.
            adopt: the pack was found in the directory, not just written. No entry moves to it; and nothing changes if
                the pack has been entered meanwhile, since entries removed since then would come back.
            uses: how often entries have been used, by key; those not named, once.
        """
        with self._transaction() as run:
            known = run("SELECT id, state FROM packs WHERE name = ?", (pack,)).fetchone()
            if adopt and known is not None and known[1] != "writing":
                return run("SELECT count(*) FROM entries WHERE pack = ?", (known[0],)).fetchone()[0]
            run("INSERT OR IGNORE INTO packs(name, state, bytes, used) VALUES(?, 'ready', 0, ?)", (pack, _tick(run)))
            run("UPDATE packs SET state = 'ready', bytes = ? WHERE name = ?", (size, pack))
            (number, used) = run("SELECT id, used FROM packs WHERE name = ?", (pack,)).fetchone()
            _set_salt(run, pack, records[0].salt if records else "")
            left = set()
            for record in records:
                name = bytes.fromhex(record.name)
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

    def touch(self, uses: dict[str, int]) -> None:
        """Adds to the uses of entries, by storage name, in order: the last one counts as used last."""
        with self._transaction() as run:
            tick = _tick(run)
            for name, count in uses.items():
                key = bytes.fromhex(name)
                run("UPDATE entries SET uses = uses + ?, used = ? WHERE name = ?", (count, tick, key))
                run(
                    """UPDATE packs SET used = ?, hot = max(hot, (SELECT uses >= 2 FROM entries WHERE name = ?))
                    WHERE id = (SELECT pack FROM entries WHERE name = ?)""",
                    (tick, key, key),
                )
                tick += 1

    def remove(self, names: Iterable[str], pack: str | None = None) -> int:
        """Forgets entries, or those of them in `pack`; returns how many. Packs left without entries are dead."""
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
        """Forgets the entries of a pack, which then is dead; returns how many there were."""
        with self._transaction() as run:
            deleted = run("DELETE FROM entries WHERE pack = (SELECT id FROM packs WHERE name = ?)", (pack,)).rowcount
            run("UPDATE packs SET state = 'dead' WHERE name = ?", (pack,))
        return deleted

    def forget_pack(self, pack: str, state: str) -> None:
        """Forgets a pack whose files are gone, if it is in this state; its bytes no longer count."""
        with self._transaction() as run:
            run("DELETE FROM packs WHERE name = ? AND state = ?", (pack, state))

    def candidates(self, capacity: int, more: int = 0) -> list[str]:
        """Returns ready packs in the order of eviction, `CANDIDATES` and so many more.

        Packs whose entries were all used once come first, then the others; within each group, the least recently used.
        Where the others hold more than four fifths of the capacity, the least recent of them move to the first group.
        """
        with self._transaction() as run:
            hot_bytes = _whole(run("SELECT hot_bytes FROM totals"))
            sql = "SELECT id, bytes FROM packs WHERE state = 'ready' AND hot = 1 ORDER BY used"
            for number, size in run(sql).fetchall() if hot_bytes > PROTECTED * capacity else []:
                if hot_bytes <= PROTECTED * capacity:
                    break
                run("UPDATE packs SET hot = 0 WHERE id = ?", (number,))
                hot_bytes -= _number(size)
            sql = "SELECT name FROM packs WHERE state = 'ready' ORDER BY hot, used LIMIT ?"
            return [name for (name,) in run(sql, (CANDIDATES + more,))]

    def recount(self) -> None:
        """Computes the totals anew from the rows."""
        with self._transaction() as run:
            run(
                """UPDATE totals SET bytes = (SELECT ifnull(sum(bytes), 0) FROM packs),
                hot_bytes = (SELECT ifnull(sum(bytes * hot), 0) FROM packs), entries = (SELECT count(*) FROM entries)"""
            )

    def shrink_log(self) -> bool:
        """Moves what is in the write-ahead log into the database, and empties it; returns whether it took space."""
        log = f"{self._path}-wal"
        if self._path is None or not os.path.exists(log) or not (size := os.path.getsize(log)):
            return False
        try:
            with self._lock:
                self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return os.path.getsize(log) < size
        except (OSError, *INDEX_ERRORS):  # others read, or there is no space even for that
            return False

    def problems(self) -> list[str]:
        """Returns what SQLite finds wrong with the database, as text."""
        with self._read() as run:
            return [str(text) for (text,) in run("PRAGMA integrity_check") if text != "ok"]


def _tick(run: Run) -> int:
    """Returns milliseconds since 1970, or more where the clock went backwards: later than every use so far."""
    return max(time.time_ns() // 10**6, _whole(run("SELECT ifnull(max(used), 0) FROM packs")) + 1)


def _whole(cursor: sqlite3.Cursor) -> int:
    """Returns the whole number that a query gives.

    Raises:
        sqlite3.DatabaseError: it gives something else, or more than can be added to.
    """
    (value,) = cursor.fetchone() or (None,)
    if not isinstance(value, int) or abs(value) > MAX_NUMBER:
        raise sqlite3.DatabaseError("the index does not hold numbers where it should")
    return value


def _number(value: object) -> int:
    """Returns a number out of a damaged row, which may hold anything: 0 for what makes no sense."""
    return value if isinstance(value, int) and 0 <= value <= MAX_NUMBER else 0


def _set_salt(run: Run, pack: str, salt: str) -> None:
    if salt:  # all entries of a pack were written by one store, and so have one salt
        run("INSERT OR REPLACE INTO salted VALUES(?, ?)", (pack, salt))


def _bury_empty(run: Run, packs: Iterable[int]) -> None:
    for number in packs:
        run(
            "UPDATE packs SET state = 'dead' WHERE id = ? AND NOT EXISTS (SELECT 1 FROM entries WHERE pack = ?)",
            (number, number),
        )


def _same_content(text: object, crc: object, record: EntryRecord) -> bool:
    old = usable_record(text, crc, record.name)
    return old is not None and content_of(old) == content_of(record)
