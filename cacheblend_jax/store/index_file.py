"""The file of an index: its tables, how to connect to it, and how to notice that it was replaced or changed."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

INDEX_VERSION = 1
COMPLETE = 0x43424C44  # the `application_id` of an index in which every pack has been entered
# On a broken database, sqlite3 may fail to decode its own error message.
INDEX_ERRORS = (sqlite3.Error, UnicodeDecodeError)
BUSY_SECONDS = 10.0
BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
BROKEN_CODES = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_INTERNAL,
)
CACHE_KIB = 128 * 1024  # of pages; a million keys need about that much

SCHEMA = f"""
CREATE TABLE packs(
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, state TEXT NOT NULL, bytes INTEGER NOT NULL,
    hot INTEGER NOT NULL DEFAULT 0, used INTEGER NOT NULL);
CREATE INDEX packs_order ON packs(state, hot, used);
CREATE INDEX packs_used ON packs(used);
CREATE TABLE entries(
    name BLOB PRIMARY KEY, pack INTEGER NOT NULL, uses INTEGER NOT NULL, used INTEGER NOT NULL, bytes INTEGER NOT NULL,
    record BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX entries_pack ON entries(pack);
CREATE TABLE totals(bytes INTEGER NOT NULL, hot_bytes INTEGER NOT NULL, entries INTEGER NOT NULL);
INSERT INTO totals VALUES(0, 0, 0);
CREATE TRIGGER pack_added AFTER INSERT ON packs BEGIN
    UPDATE totals SET bytes = bytes + new.bytes, hot_bytes = hot_bytes + new.bytes * new.hot; END;
CREATE TRIGGER pack_removed AFTER DELETE ON packs BEGIN
    UPDATE totals SET bytes = bytes - old.bytes, hot_bytes = hot_bytes - old.bytes * old.hot; END;
CREATE TRIGGER pack_changed AFTER UPDATE OF bytes, hot ON packs BEGIN
    UPDATE totals SET bytes = bytes + new.bytes - old.bytes,
        hot_bytes = hot_bytes + new.bytes * new.hot - old.bytes * old.hot; END;
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN UPDATE totals SET entries = entries + 1; END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN UPDATE totals SET entries = entries - 1; END;
PRAGMA user_version = {INDEX_VERSION};
"""

# Whose packs are whose. An index made before entries were told apart by their salts lacks this table until it is opened
# to be written. A pack without a row belongs to stores without a salt.
SALTS = """
CREATE TABLE salted(pack TEXT PRIMARY KEY, salt TEXT NOT NULL);
CREATE INDEX salted_salt ON salted(salt);
CREATE TRIGGER salted_removed AFTER DELETE ON packs BEGIN DELETE FROM salted WHERE pack = old.name; END;
"""


def statements(script: str) -> Iterator[str]:
    """Splits a script into statements, since `executescript` would end the transaction. Triggers contain semicolons."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def connected(path: str | None, mode: str = "") -> sqlite3.Connection:
    """Connects to a file, or to a new database in memory.

    Args:
        path: `None`: in memory.
        mode: SQLite's URI parameters for a file that is only read; it is checked at once.

    Raises:
        sqlite3.Error: the file cannot be opened; or, where it is checked, as `check`.
    """
    target = ":memory:" if path is None else f"{Path(path).absolute().as_uri()}?{mode}" if mode else path
    connection = sqlite3.connect(
        target, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=bool(mode)
    )
    try:
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if mode:
            check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check(connection: sqlite3.Connection) -> None:
    """Checks that a database is an index of this version.

    Raises:
        sqlite3.Error: it is not, or cannot be read.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute("SELECT bytes, entries FROM totals").fetchone()
    if version != INDEX_VERSION:
        raise sqlite3.DatabaseError(f"index version {version}; this code reads version {INDEX_VERSION}")


def is_broken(error: BaseException) -> bool:
    """Whether an error says that the database is damaged, or not an index at all; not that it is locked, full, closed.

    Statements of this code fail with `SQLITE_ERROR` only where tables or columns are not those that it made.
    """
    if isinstance(error, UnicodeDecodeError) or "Could not decode to UTF-8" in str(error):  # as sqlite3 reports text
        return True
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return type(error) is sqlite3.DatabaseError  # raised by this code
    return code & 0xFF in BROKEN_CODES


def has_salts(connection: sqlite3.Connection) -> bool:
    """Whether an index has the table of salts."""
    return connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'salted'").fetchone()[0] > 0


def has_index_header(path: str) -> bool:
    """Whether a file begins as a complete index does, whatever else is in it."""
    with open(path, "rb") as file:
        header = file.read(100)
    return header.startswith(b"SQLite format 3\0") and header[68:72] == COMPLETE.to_bytes(4, "big")


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file, not a directory or a symbolic link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def is_foreign(path: str) -> bool:
    """Whether what stands in the place of an index is no index, nor a damaged one, but belongs to somebody else."""
    if not is_regular(path):
        return os.path.lexists(path)
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except INDEX_ERRORS:
        return False
    return bool(tables) and tables.isdisjoint(("packs", "entries", "totals"))


def identity_of(path: str) -> tuple[int, int] | None:
    """Returns device and inode of a file; `None` where there is none."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def state_of(path: str) -> tuple[int, ...]:
    """Returns the size, the time of change and whether there is a write-ahead log: one changes with every write."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, os.path.exists(path + "-wal")
