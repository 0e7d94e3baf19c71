"""What others do to a store's directory, and what callers may not ask for: recovered from, or said at once."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from store_cases import BIG, check_all, fill, key_of, largest_file, make_entry, packs, same

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.store.chunk_store import check_text
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.maintenance import prune
from cacheblend_jax.store.places import located


def replace_index(index: Path, kind: str, outside: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{index}{suffix}").unlink(missing_ok=True)
    if kind == "directory":
        index.mkdir()
        (index / "novel.txt").write_text("mine")
    elif kind == "dangling link":
        index.symlink_to(outside / "gone")
    elif kind == "link":
        (outside / "database").write_text("mine")
        index.symlink_to(outside / "database")
    else:
        with closing(sqlite3.connect(index)) as connection, connection:
            connection.execute("CREATE TABLE books(title TEXT)")
            connection.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("kind", ["another database", "directory", "dangling link", "link"])
def test_what_stands_in_the_place_of_the_index_is_kept_and_the_index_made_anew(tmp_path, kind, in_use):
    directory, outside = tmp_path / "kv", tmp_path / "outside"
    outside.mkdir()
    fill(directory, range(2), one_by_one=True)
    index = directory / "index.sqlite"
    if not in_use:
        replace_index(index, kind, outside)
    with cb.ChunkStore(directory, host_bytes=1) as store:
        if in_use:
            replace_index(index, kind, outside)
        store.put(key_of(5), make_entry(5), wait=True)
        store.flush()
        assert store.stats.written == 1
        assert all(same(store.get(key_of(seed)), make_entry(seed)) for seed in (0, 1, 5))
    assert check_all(directory, 6) == 3
    (kept,) = (directory / "quarantine").iterdir()
    with closing(DiskTier(directory)) as disk:
        prune(disk, quarantined=True)
    kept = kept / "index.sqlite"
    if kind == "directory":
        assert (kept / "novel.txt").read_text() == "mine"
    elif kind == "another database":
        with closing(sqlite3.connect(kept)) as connection:
            assert connection.execute("SELECT count(*) FROM books").fetchone() == (0,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # nothing was changed in it
    else:
        assert kept.is_symlink()
        assert [path.read_text() for path in outside.iterdir()] == ["mine"] * (kind == "link")


@pytest.mark.parametrize("gone", [".", "index.sqlite", "packs", "writing", "quarantine", "cacheblend-store.json"])
@pytest.mark.parametrize("then", ["write", "remove", "clear", "damage"])
def test_what_is_removed_in_use_is_made_anew(tmp_path, gone, then):
    directory = tmp_path / "kv"
    fill(directory, range(3), one_by_one=True, tokens=BIG)
    with cb.ChunkStore(directory, host_bytes=1) as store:
        if then == "damage":
            os.truncate(largest_file(packs(directory)[0]), 10)
        path = directory / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
        if then == "remove":
            store.remove(key_of(1))
        elif then == "clear":
            store.clear()
        elif then == "damage":
            lost = sum(store.get(key_of(seed)) is None for seed in range(3))
            assert lost == (3 if gone in (".", "packs") else 1)
        for seed in (7, 8):
            store.put(key_of(seed), make_entry(seed, BIG), wait=True)
            store.flush()
        assert all(same(store.get(key_of(seed)), make_entry(seed, BIG)) for seed in (7, 8))
        assert store.stats.written == 2
    left = {".": 0, "packs": 0}.get(gone, {"write": 3, "remove": 2, "clear": 0, "damage": 2}[then])
    with cb.ChunkStore(directory) as store:
        for seed in range(3):
            store.get(key_of(seed))
    assert check_all(directory) == left + 2 == len(packs(directory))


def test_a_directory_of_others_in_the_place_of_a_store_in_use_is_left_alone(tmp_path, caplog):
    directory = tmp_path / "kv"
    fill(directory, [1])
    with cb.ChunkStore(directory, host_bytes=2**20) as store:
        shutil.rmtree(directory)
        directory.mkdir()
        (directory / "novel.txt").write_text("mine")
        for seed in (2, 3):
            store.put(key_of(seed), make_entry(seed))
            store.flush()
        assert same(store.get(key_of(2)), make_entry(2))
        assert store.stats.write_errors == 2
        with pytest.raises(cb.CacheBlendError, match="is a directory with other files in it"):
            store.clear()
    assert [path.name for path in directory.iterdir()] == ["novel.txt"]
    assert sum("other files in it" in record.message for record in caplog.records) == 1


def test_a_read_only_store_says_so_once_and_counts(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with cb.ChunkStore(tmp_path) as store:
            for seed in (1, 2, 3):
                store.put(key_of(seed), make_entry(seed))
            store.flush()
            assert (store.stats.unwritable, store.stats.written, store.stats.write_errors) == (3, 0, 0)
            assert same(store.get(key_of(3)), make_entry(3))
    assert [record.message for record in caplog.records if "cacheblend" in record.name] == [
        f"store {tmp_path}: entries are read, but not written: this process may not write there"
    ]


@pytest.mark.parametrize("fate", ["damaged", "evicted", "removed", "read"])
def test_packs_that_are_links_are_missing_and_what_they_lead_to_stays(tmp_path, fate):
    directory, outside = tmp_path / "kv", tmp_path / "outside"
    fill(directory, range(3), one_by_one=True, tokens=BIG)
    with closing(DiskTier(directory)) as disk:
        pack = directory / "packs" / disk.index.find(key_of(1)).pack
    pack.rename(outside)
    pack.symlink_to(outside)
    before = {path: path.stat().st_size for path in outside.rglob("*")}
    if fate == "damaged":
        os.truncate(largest_file(outside), 10)
        before = {path: path.stat().st_size for path in outside.rglob("*")}
    with cb.ChunkStore(directory, host_bytes=1) as store:
        if fate == "evicted":
            with closing(DiskTier(directory)) as disk:
                prune(disk, max_bytes=0)
        elif fate == "removed":
            assert store.remove(key_of(1))
        else:
            assert store.get(key_of(1)) is None
    left = 0 if fate == "evicted" else 2
    for _ in range(2):
        assert main(["store", "prune", "--quarantine", str(directory)]) == 0
        assert main(["store", "verify", "--repair", str(directory)]) == 0
    with cb.ChunkStore(directory) as store:
        assert (len(store), store.stats.disk.entries) == (left, left)
        size = sum(path.stat().st_size for path in (directory / "packs").rglob("*") if path.is_file())
        assert store.stats.disk.bytes == size
    assert {path: path.stat().st_size for path in outside.rglob("*")} == before
    assert pack.is_symlink()


@pytest.mark.parametrize("key", [None, 7, b"a", "\ud800"])
def test_a_key_that_is_no_text_is_refused_at_once(tmp_path, key):
    with cb.ChunkStore(tmp_path) as store:
        calls = [lambda: store.put(key, make_entry(1)), lambda: store.get(key), lambda: store.open(key)]
        for call in [*calls, lambda: store.remove(key), lambda: store.promote(key)]:
            with pytest.raises(cb.CacheBlendError, match="key must be a str that UTF-8 can encode, got"):
                call()
        assert key not in store
        assert len(store) == 0
    check_text("key", "\U0001f600")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "http://x",
            "is a URL of a kind that is not supported; expected a path, or a URL that begins with gs:// or s3",
        ),
        ("memory://x", "is a URL of a kind that is not supported"),
        ("a\0b", "is no path: it has a zero byte"),
        ("a\ud800b", "is no path: "),
    ],
)
def test_a_place_that_is_none_is_refused(path, message):
    for refuse in (cb.ChunkStore, located, DiskTier.exists):
        with pytest.raises(cb.CacheBlendError, match=message):
            refuse(path)


def test_object_storage_without_its_package_names_it(monkeypatch):
    def missing(self):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.exists", missing)
    with pytest.raises(cb.CacheBlendError, match="needs a package that is not installed: Install s3fs to access S3"):
        cb.ChunkStore("s3://bucket/kv")
