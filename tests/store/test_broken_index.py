"""A damaged index is made anew or reported in one line, whatever the command or the call that meets it."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from store_cases import fill, key_of, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.store.disk import DiskTier

PAGE = 4096
COMMANDS = {
    "ls": ["ls"],
    "verify": ["verify"],
    "repair": ["verify", "--repair"],
    "prune": ["prune", "--max-bytes", "1000"],
    "rm": ["rm", key_of(2)],
}
# Values in place of those that belong there: SQLite stores anything anywhere.
DAMAGE = [
    "UPDATE packs SET name = CAST(x'ff' || name AS TEXT) WHERE id = 1",
    "UPDATE packs SET bytes = 'many'",
    "UPDATE packs SET bytes = 'many', hot = 1",
    "UPDATE packs SET used = 9223372036854775807 WHERE id = 1",
    "UPDATE packs SET used = 'soon'",
    "UPDATE entries SET used = 9223372036854775807, uses = 'often', bytes = 'many' WHERE rowid = 1",
    "UPDATE entries SET used = 0.5, uses = x'00', bytes = -1, record = NULL, crc = 'none' WHERE rowid = 1",
    "UPDATE entries SET pack = 99 WHERE rowid = 1",
    "UPDATE totals SET bytes = 'many'",
    "UPDATE totals SET hot_bytes = NULL",
    "DELETE FROM totals",
    "DROP TABLE salted",
    "DROP TABLE entries",
    "ALTER TABLE packs RENAME COLUMN hot TO hop",
]
# Repairing meets all damage, and the other commands take turns.
OTHERS = [name for name in COMMANDS if name != "repair"]
PAIRS = [(damage, command) for i, damage in enumerate(DAMAGE) for command in ("repair", OTHERS[i % len(OTHERS)])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A directory with four packs; tests damage copies of it."""
    directory = tmp_path_factory.mktemp("whole")
    fill(directory, range(4), one_by_one=True)
    return directory


def run(directory: Path, command: str, capsys) -> str:
    """Runs a command, which ends with its own exit code and warns of the store alone; returns what it printed."""
    name, *options = COMMANDS[command]
    code = main(["store", name, str(directory), *options])
    printed = capsys.readouterr()
    assert code in ((0, 1) if name == "verify" else (0,)), printed.err
    warned = f"cacheblend-jax: warning: store {directory}: "
    assert all(line.startswith(warned) for line in printed.err.splitlines()), printed.err
    return printed.out


def lax(connection: sqlite3.Connection) -> None:
    """Lets a test write what the schema forbids."""
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")


@pytest.mark.once
@pytest.mark.parametrize("command", COMMANDS)
def test_flipped_bits_in_the_index_end_no_command(tmp_path, capsys, command, whole):
    rng = random.Random(command)
    size = (whole / "index.sqlite").stat().st_size
    pages = [100, *range(PAGE, size, PAGE)]  # where each page says what it is
    for place in pages + [rng.randrange(size) for _ in range(8)]:
        shutil.rmtree(tmp_path / "kv", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "kv")
        content = bytearray((tmp_path / "kv" / "index.sqlite").read_bytes())
        content[place] ^= 1 << rng.randrange(8)
        (tmp_path / "kv" / "index.sqlite").write_bytes(content)
        run(tmp_path / "kv", command, capsys)
        if command == "repair":
            assert report_of(tmp_path / "kv")["problems"] == []
        with cb.ChunkStore(tmp_path / "kv") as store:
            for seed in range(4):
                entry = store.get(key_of(seed))
                assert entry is None or same(entry, make_entry(seed))
            assert command not in ("prune", "rm") or key_of(2) not in store


@pytest.mark.parametrize(("damage", "command"), PAIRS)
def test_rows_that_make_no_sense_end_no_command(tmp_path, capsys, command, damage, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        lax(connection)
        connection.commit()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute(damage)
    run(tmp_path, command, capsys)
    with cb.ChunkStore(tmp_path) as store:
        store.put(key_of(9), make_entry(9))
        store.flush()
        assert store.stats.write_errors == 0
        assert store.stats.written == 1
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get(key_of(9)), make_entry(9))


@pytest.mark.parametrize("call", ["remove", "clear"])
@pytest.mark.parametrize("damage", ["DROP TABLE entries", "UPDATE totals SET bytes = 'many'"])
def test_an_index_that_breaks_in_use_ends_no_removal(tmp_path, call, damage):
    fill(tmp_path, range(3), one_by_one=True)
    with cb.ChunkStore(tmp_path) as store:
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
            connection.execute(damage)
        assert store.remove(key_of(1)) in (True, False) if call == "remove" else store.clear() is None
        assert store.get(key_of(1)) is None
    with cb.ChunkStore(tmp_path) as store:
        assert set(store.keys()) == ({key_of(0), key_of(2)} if call == "remove" else set())
        assert len(packs(tmp_path)) == len(store)


def test_verify_repairs_what_only_a_check_of_the_index_finds(tmp_path, capsys, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_master WHERE name = 'packs_used'")  # whose page belongs to nobody now
    assert "index: " in run(tmp_path, "verify", capsys)
    assert "4 entries in 4 packs read" in run(tmp_path, "repair", capsys)
    assert report_of(tmp_path)["problems"] == []


def test_a_broken_index_that_cannot_be_made_anew_is_one_line(tmp_path, capsys, monkeypatch):
    fill(tmp_path, [1])
    monkeypatch.setattr(DiskTier, "replace_broken_index", lambda self: False)
    monkeypatch.setattr("cacheblend_jax.store.index.Index.listed", lambda *_, **__: broken())
    assert main(["store", "ls", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors == f"cacheblend-jax: error: the index of store '{tmp_path}' cannot be used: malformed\n"


def broken():
    raise sqlite3.DatabaseError("malformed")
