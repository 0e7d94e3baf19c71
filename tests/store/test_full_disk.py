"""A file system without space: the store goes on saving by evicting, and what removes entries frees space."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
from contextlib import closing, suppress
from pathlib import Path

import pytest
from store_cases import BIG, check_all, fill, key_of, largest_file, make_entry, packs, same

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.store import space
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.index import Index

MB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 3 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "x", directory]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def take_all_space(directory: Path) -> None:
    with suppress(OSError), open(directory / "others", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop
def test_a_store_that_fills_its_disk_evicts_and_goes_on_saving(small_disk, caplog):
    with cb.ChunkStore(small_disk / "kv") as store:
        for seed in range(12):
            store.put(key_of(seed), make_entry(seed, tokens=1000))
            store.flush()
        stats = store.stats
        assert (stats.written, stats.write_errors) == (12, 0)
        assert stats.disk.entries >= 3
        assert stats.disk.evicted == 12 - stats.disk.entries
        assert list((small_disk / "kv" / "writing").iterdir()) == []
    with cb.ChunkStore(small_disk / "kv") as store:
        assert key_of(11) in store
    assert check_all(small_disk / "kv", 1000) == stats.disk.entries


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop
def test_what_no_eviction_makes_space_for_evicts_nothing(small_disk, caplog):
    with cb.ChunkStore(small_disk / "kv") as store:
        store.put(key_of(1), make_entry(1, tokens=100))
        store.flush()
        for seed in (2, 3):
            store.put(key_of(seed), make_entry(seed, tokens=9000))
            store.flush()
        stats = store.stats
        assert (stats.written, stats.write_errors, stats.disk.entries) == (1, 2, 1)
        assert same(store.get(key_of(2)), make_entry(2, tokens=9000))
    assert sum("stay in memory only" in record.message for record in caplog.records) == 1


def removals(directory: Path) -> dict:
    def in_store(remove):
        with cb.ChunkStore(directory) as store:
            remove(store)

    def command(*arguments):
        assert main(["store", *map(str, arguments)]) == 0

    return {
        "remove": lambda: in_store(lambda store: store.remove(key_of(2))),
        "clear": lambda: in_store(lambda store: store.clear()),
        "rm": lambda: command("rm", directory, key_of(2)),
        "prune": lambda: command("prune", directory, "--max-bytes", 0),
        "prune days": lambda: command("prune", directory, "--unused-days", 0),
        "repair": lambda: command("verify", directory, "--repair"),
    }


@pytest.mark.parametrize("name", list(removals(Path())))
def test_what_removes_entries_frees_space_when_there_is_none(small_disk, name):
    directory = small_disk / "kv"
    seeds = [10**60 * seed for seed in range(4)]
    fill(directory, [*seeds[:2], 2], one_by_one=True, tokens=500)
    take_all_space(small_disk)
    assert os.statvfs(small_disk).f_bavail == 0
    removals(directory)[name]()
    left = check_all(directory, 500)
    assert left <= {"remove": 2, "rm": 2, "repair": 3}.get(name, 0)
    with cb.ChunkStore(directory) as store:
        assert name == "repair" or key_of(2) not in store
        assert store.stats.disk.entries == left == len(packs(directory))
    if name != "repair":
        assert os.statvfs(small_disk).f_bavail > 0


def no_space(*_, **__):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


@pytest.mark.parametrize("what", ["remove", "write", "clear"])
def test_packs_that_go_anyway_go_first(tmp_path, monkeypatch, what, caplog):
    """As above without a file system of its own: the index can be written once a pack has gone."""
    fill(tmp_path, range(3), one_by_one=True, tokens=BIG)
    with cb.ChunkStore(tmp_path) as store:
        transaction, before = Index._transaction, set(packs(tmp_path))

        def with_a_pack_less(self):
            return no_space() if before.issubset(packs(tmp_path)) else transaction(self)

        monkeypatch.setattr(Index, "_transaction", with_a_pack_less)
        if what == "remove":
            assert store.remove(key_of(2))
            left = {key_of(0), key_of(1)}
        elif what == "clear":
            store.clear()
            left = set()
        else:
            store.put(key_of(7), make_entry(7, BIG))
            store.flush()
            left = {key_of(1), key_of(2), key_of(7)}
            assert (store.stats.written, store.stats.disk.evicted) == (1, 1)
        monkeypatch.undo()
        assert ("1 entries were evicted to make space" in caplog.text) == (what == "write")
    with cb.ChunkStore(tmp_path) as store:
        assert set(store.keys()) == left
    assert check_all(tmp_path) == len(left) == len(packs(tmp_path))


def test_the_quarantine_goes_before_any_pack_and_what_is_read_stays(tmp_path, monkeypatch):
    fill(tmp_path, range(3), one_by_one=True, tokens=BIG)
    victim = packs(tmp_path)[0]
    os.truncate(largest_file(victim), 10)
    with closing(DiskTier(tmp_path, 2**40)) as disk:
        (damaged,) = [seed for seed in range(3) if disk.load(key_of(seed)) is None]
        first, second = [seed for seed in range(3) if seed != damaged]
        calls = []

        def action():
            calls.append(len(packs(tmp_path)))
            return "done" if len(calls) == 4 else no_space()  # the index's log, the quarantine, a pack

        with disk.open(key_of(first)):
            result, removed = space.with_space(disk.places, disk.index, disk.log, action)
        assert (result, calls, len(removed)) == ("done", [2, 2, 2, 1], 1)
        assert list((tmp_path / "quarantine").iterdir()) == []
        space.forget_removed(disk.index, disk.log, removed)
        assert (disk.load(key_of(first)) is not None, disk.load(key_of(second))) == (True, None)
        assert disk.stats().entries == 1


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    fill(tmp_path, [1])
    with closing(DiskTier(tmp_path, 2**40)) as disk:
        assert space.lacks_space(disk.places, OSError(errno.ENOSPC, "full"))
        assert space.lacks_space(disk.places, ValueError("RESOURCE_EXHAUSTED: [OS error: No space left on device]"))
        for error in (OSError(errno.EACCES, "no"), ValueError("shape"), sqlite3.OperationalError("disk I/O error")):
            assert not space.lacks_space(disk.places, error)
