"""Opening a directory: beside others, after a crash, with a broken index, or without the right to write there."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from store_cases import BIG, check_all, fill, key_of, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.store import index_file, recovery
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.entry import QueuedEntry


def test_strangers_and_names_taken_stop_no_opening(tmp_path, monkeypatch):
    fill(tmp_path, range(3), one_by_one=True, tokens=BIG)
    torn, gone, _ = packs(tmp_path)
    (tmp_path / "packs" / ".DS_Store").write_text("x")
    (tmp_path / "packs" / ".ipynb_checkpoints").mkdir()
    assert report_of(tmp_path, repair=True)["problems"] == []
    (tmp_path / "index.sqlite").unlink()
    (torn / "entries.json").write_bytes(b"")
    shutil.copytree(torn, tmp_path / "quarantine" / torn.name)  # as damage in one entry of several leaves it

    read_pack = recovery.read_contents

    def read_contents(path):
        if path == gone:  # another process evicts it just now
            shutil.rmtree(gone)
        return read_pack(path)

    monkeypatch.setattr(recovery, "read_contents", read_contents)
    with cb.ChunkStore(tmp_path) as store:
        assert (store.stats.disk.entries, store.stats.damaged) == (1, 1)
    assert not torn.exists()
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    assert {".DS_Store", ".ipynb_checkpoints"} < {path.name for path in packs(tmp_path)}


def test_a_crash_while_the_index_is_made_anew_loses_nothing(tmp_path, monkeypatch):
    fill(tmp_path, range(4), one_by_one=True)
    (tmp_path / "index.sqlite").unlink()
    adopt, calls = recovery.adopt, itertools.count()

    def crash(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return adopt(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "adopt", crash)
        with pytest.raises(KeyboardInterrupt):
            DiskTier(tmp_path, 2**40)
    assert check_all(tmp_path, 6) == 4
    monkeypatch.setattr(recovery, "adopt_all", None)  # from then on, the packs are not looked through again
    assert check_all(tmp_path, 6) == 4


@pytest.mark.parametrize("state", ["unknown", "writing"])
def test_a_pack_that_cannot_be_read_now_is_entered_later(tmp_path, monkeypatch, state):
    fill(tmp_path, range(3), one_by_one=True)
    if state == "unknown":
        (tmp_path / "index.sqlite").unlink()
    else:  # as a writer leaves it that was killed between renaming its pack and entering it
        with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as index:
            index.execute("DELETE FROM entries WHERE pack = 1")
            index.execute("UPDATE packs SET state = 'writing' WHERE id = 1")

    def no_descriptors(path):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "read_contents", no_descriptors)
        assert check_all(tmp_path, 6) == (0 if state == "unknown" else 2)
    assert check_all(tmp_path, 6) == 3


def test_what_was_removed_does_not_come_back_by_an_opening(tmp_path):
    """Two processes find a pack unknown; one enters it and removes its entry before the other enters it too."""
    fill(tmp_path, [1])
    (pack,) = packs(tmp_path)
    with closing(DiskTier(tmp_path, 2**40)) as disk, disk.open(key_of(1)):  # read: the files stay
        disk.remove([key_of(1)])
        assert recovery.adopt(disk.places, disk.index, disk.log, pack.name)
        assert disk.load(key_of(1)) is None


def test_a_new_directory_that_others_open_too_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.index_file.BUSY_SECONDS", 0.01)
    fill(tmp_path, [])
    (tmp_path / "index.sqlite").unlink()
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
    disk = DiskTier(tmp_path, 2**40)
    assert disk.writable
    disk.close()


def test_an_index_that_breaks_under_two_stores_is_made_anew_once(tmp_path):
    fill(tmp_path, range(3), one_by_one=True)
    one, other = (DiskTier(tmp_path, 2**40) for _ in range(2))
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    for disk in (one, other):
        for connection in (disk.index._reading, disk.index._writing):
            connection.execute("PRAGMA shrink_memory")  # of the pages that it remembers
        assert disk.load(key_of(0)) is None
        assert disk.stats().damaged == 1
        disk.write([QueuedEntry(key_of(8 + (disk is other)), make_entry(8 + (disk is other)))])
    for disk in (one, other):
        assert all(same(disk.load(key_of(seed))[0], make_entry(seed)) for seed in (0, 1, 2, 8, 9))
        disk.close()
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_who_writes_follows_an_index_that_another_made(tmp_path):
    fill(tmp_path, [1])
    with closing(DiskTier(tmp_path, 2**40)) as ours:
        recovery.set_index_aside(ours.places, ours.index.identity)  # as another process does that finds it broken
        fill(tmp_path, [2])
        ours.write([QueuedEntry(key_of(3), make_entry(3))])
    with cb.ChunkStore(tmp_path) as store:
        assert {*store.keys()} == {key_of(seed) for seed in (1, 2, 3)}


def test_an_index_that_cannot_be_made_anew_is_a_miss(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with cb.ChunkStore(tmp_path) as store:

        def broken(name):
            raise sqlite3.DatabaseError("database disk image is malformed")

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store._disk.disk.index, "find", broken)
        monkeypatch.setattr(recovery, "open_index", refuse)
        for _ in range(2):
            assert store.get(key_of(1)) is None
        assert (store.stats.misses, store.stats.damaged) == (2, 1)
        assert store.stats.read_errors >= 2


def test_a_damaged_record_is_no_key(tmp_path):
    fill(tmp_path, range(3))
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE entries SET record = CAST(x'ff' || record AS BLOB) WHERE rowid = 1")
    with cb.ChunkStore(tmp_path) as store:
        assert len(store) == 2
        assert sum(store.get(key_of(seed)) is None for seed in range(3)) == store.stats.damaged == 1


def test_what_another_user_writes_now_stops_no_opening(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    (tmp_path / "writing" / ("a" * 32)).mkdir()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recovery, "Pin", refuse)
    with closing(DiskTier(tmp_path, 2**40)) as disk:
        assert disk.writable
    assert check_all(tmp_path, 6) == 1
    assert len(list((tmp_path / "writing").iterdir())) == 1


def open_to_read(directory: Path, monkeypatch) -> cb.ChunkStore:
    """Opens a store as who may not write there, while nobody else has it open: the index counts as a file at rest."""

    def without_others(path, mode=""):
        if mode == "mode=ro":
            raise sqlite3.OperationalError("unable to open database file")
        return index_file.connected(path, mode)

    monkeypatch.setattr("cacheblend_jax.store.index.connected", without_others)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        return cb.ChunkStore(directory, host_bytes=1)


def test_who_may_only_read_sees_what_others_write(tmp_path, monkeypatch):
    fill(tmp_path, range(2), one_by_one=True)
    with open_to_read(tmp_path, monkeypatch) as reader:
        (tmp_path / "packs").rename(tmp_path / "away")
        assert reader.get(key_of(1)) is None
        (tmp_path / "away").rename(tmp_path / "packs")
        with cb.ChunkStore(tmp_path) as writer:
            writer.remove(key_of(0))
            for seed in (0, 7):
                writer.put(key_of(seed), make_entry(seed))
        assert all(same(reader.get(key_of(seed)), make_entry(seed)) for seed in (0, 1, 7))
        assert reader.stats.damaged == 0


def test_who_may_only_read_is_told_so_when_removing(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with open_to_read(tmp_path, monkeypatch) as reader:
        for remove in (lambda: reader.remove(key_of(1)), reader.clear):
            with pytest.raises(cb.CacheBlendError, match=f"{tmp_path}.* cannot be written"):
                remove()
        assert same(reader.get(key_of(1)), make_entry(1))
