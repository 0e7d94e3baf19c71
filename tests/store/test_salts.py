"""A salt hides: a store sees, counts, lists and removes its own entries only; looking after all is another door."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from store_cases import BIG, fill, key_of, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.maintenance import prune
from cacheblend_jax.store.record import salt_hash

SALTS = ("", "mine", "theirs")


def fill_salted(directory, tokens: int = 6) -> None:
    """Stores the same key under three salts, and one more under each."""
    for number, salt in enumerate(SALTS):
        with cb.ChunkStore(directory, salt=salt) as store:
            store.put("a", make_entry(number, tokens))
            store.put(key_of(10 + number), make_entry(10 + number, tokens))
            store.flush()
            assert store.stats.written == 2


def sees(directory, salt: str, number: int, tokens: int = 6) -> bool:
    with cb.ChunkStore(directory, salt=salt) as store:
        assert set(store.keys()) <= {"a", key_of(10 + number)}
        assert len(store) == store.stats.disk.entries
        found = [store.get("a"), store.get(key_of(10 + number))]
        return same(found[0], make_entry(number, tokens)) and same(found[1], make_entry(10 + number, tokens))


@pytest.mark.parametrize("lost", [None, "index", "table"])
def test_a_salt_sees_its_own_entries_only(tmp_path, lost):
    fill_salted(tmp_path)
    if lost == "index":
        (tmp_path / "index.sqlite").unlink()
    elif lost == "table":  # as an index made before there was one
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
            connection.execute("DROP TRIGGER salted_removed")
            connection.execute("DROP TABLE salted")
        fill(tmp_path, [77])  # it opens, and takes entries
        with cb.ChunkStore(tmp_path) as store:
            assert store.remove(key_of(77))
    for number, salt in enumerate(SALTS):
        if lost != "table":
            assert sees(tmp_path, salt, number)
        with cb.ChunkStore(tmp_path, salt=salt) as store:
            assert same(store.get("a"), make_entry(number))
            for other in range(3):
                if other != number:
                    assert key_of(10 + other) not in store
                    assert store.get(key_of(10 + other)) is store.open(key_of(10 + other)) is None
    assert report_of(tmp_path)["problems"] == []
    assert len(packs(tmp_path)) == 3


def test_no_name_leads_to_another_salts_entry(tmp_path):
    fill_salted(tmp_path)
    with closing(DiskTier(tmp_path, 2**40)) as disk:
        names = [row.name for row in disk.index.listed() if salt_hash("mine").encode() in row.record]
    assert len(names) == 2
    with cb.ChunkStore(tmp_path) as store:
        for name in names:
            assert (store.get(name), store.open(name), name in store, store.remove(name)) == (None, None, False, False)
            store.put(name, make_entry(5))
    assert sees(tmp_path, "mine", 1)


def test_a_salt_removes_and_counts_its_own_entries_only(tmp_path):
    fill_salted(tmp_path, BIG)
    with cb.ChunkStore(tmp_path, salt="mine") as store:
        own = store.stats.disk.bytes
        assert own < sum(path.stat().st_size for path in (tmp_path / "packs").rglob("*") if path.is_file()) / 2
        assert not store.remove(key_of(10))
        assert store.remove("a")
        assert (len(store), store.stats.disk.entries) == (1, 1)
        store.clear()
        assert (len(store), store.stats.disk.entries, store.stats.disk.bytes) == (0, 0, 0)
    assert sees(tmp_path, "", 0, BIG)
    assert sees(tmp_path, "theirs", 2, BIG)
    with cb.ChunkStore(tmp_path) as store:
        store.clear()
    assert sees(tmp_path, "theirs", 2, BIG)
    with closing(DiskTier(tmp_path, 2**40)) as disk:  # the door for all of them
        assert prune(disk, max_bytes=0)["removed"] == 2
    assert packs(tmp_path) == []


def test_records_without_a_salt_belong_to_stores_without_one(tmp_path, monkeypatch):
    from cacheblend_jax.store import disk

    with monkeypatch.context() as patch:  # as the versions before: the salt is in the key alone
        patch.setattr(disk, "salt_hash", lambda salt: "")
        fill(tmp_path, [1], salt="mine")
    with cb.ChunkStore(tmp_path, salt="mine") as store:
        assert store.get(key_of(1)) is None
        store.put(key_of(1), make_entry(1))
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get(key_of(1)), make_entry(1))
        store.clear()
    with cb.ChunkStore(tmp_path, salt="mine") as store:
        assert same(store.get(key_of(1)), make_entry(1))


@pytest.mark.parametrize("salt", [None, 7, b"mine", "\ud800"])
def test_a_salt_that_is_no_text_is_refused(tmp_path, salt):
    with pytest.raises(cb.CacheBlendError, match="salt must be a str that UTF-8 can encode, got"):
        cb.ChunkStore(tmp_path / "kv", salt=salt)
    assert not (tmp_path / "kv").exists()


def test_the_commands_show_salted_entries_when_told_to(capsys, tmp_path):
    fill_salted(tmp_path / "kv")
    assert main(["store", "ls", str(tmp_path / "kv"), "--json", str(tmp_path / "report")]) == 0
    assert "2 entries" in (printed := capsys.readouterr().out)
    assert "4 more with a salt: see --all" in printed
    assert {entry["salt"] for entry in json.loads((tmp_path / "report").read_text())["entries"]} == {""}
    assert main(["store", "ls", str(tmp_path / "kv"), "--all", "--json", str(tmp_path / "report")]) == 0
    assert "6 entries" in capsys.readouterr().out
    listed = json.loads((tmp_path / "report").read_text())["entries"]
    name = next(entry["name"] for entry in listed if entry["salt"] == salt_hash("theirs"))
    assert main(["store", "rm", str(tmp_path / "kv"), name]) == 2
    assert "names 0 entries" in capsys.readouterr().err
    assert main(["store", "rm", str(tmp_path / "kv"), "--all", name]) == 0
    with cb.ChunkStore(tmp_path / "kv", salt="theirs") as store:
        assert len(store) == 1
