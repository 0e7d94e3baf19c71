"""A store opens, cleans and removes only what a store has made, and follows no symbolic links."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from etils import epath
from store_cases import BIG, check_all, fill, key_of, largest_file, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.marker import MARKER_NAME
from cacheblend_jax.store.ownership import claim

HEX = "0123456789abcdef" * 2


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def users_folder(directory: Path, kind: str) -> None:
    if kind == "novel":
        (directory / "writing" / "novel").mkdir(parents=True)
    elif kind == "samples":  # named by their MD5
        (directory / "quarantine" / HEX).mkdir(parents=True)
    elif kind == "packages":
        (directory / "packs" / HEX).mkdir(parents=True)
        (directory / "packs" / HEX / "entries.json").write_text("[]")
    elif kind == "database":
        with closing(sqlite3.connect(directory / "index.sqlite")) as connection, connection:
            connection.execute("CREATE TABLE books(title TEXT)")
    elif kind == "notes":
        (directory / "notes.txt").write_text("mine")
    elif kind == "link":
        (directory / "elsewhere").mkdir()
        (directory / "quarantine").symlink_to(directory / "elsewhere")
    elif kind == "dangling":
        (directory / "index.sqlite").symlink_to(directory / "gone")
    elif kind == "marker link":
        (directory / MARKER_NAME).symlink_to(directory / "gone")


@pytest.mark.parametrize(
    "kind", ["novel", "samples", "packages", "database", "notes", "link", "dangling", "marker link"]
)
def test_a_directory_that_is_no_store_is_refused_and_left_alone(tmp_path, kind):
    users_folder(tmp_path, kind)
    before = tree(tmp_path)
    with pytest.raises(cb.CacheBlendError, match=f"store '{tmp_path}' (is a directory with other files|has a symb)"):
        cb.ChunkStore(tmp_path)
    assert tree(tmp_path) == before
    assert not DiskTier.exists(tmp_path)


def test_an_empty_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cb.CacheBlendError, match="the store's path is empty"):
        cb.ChunkStore("")
    assert list(tmp_path.iterdir()) == []


def test_what_is_as_good_as_empty_becomes_a_store(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "writing" / f"calibration-{HEX}" / "store").mkdir(parents=True)  # of a calibration that was killed
    (tmp_path / f"{MARKER_NAME}.{HEX}").write_text("{")  # of an opening that was killed
    fill(tmp_path, [1])
    assert check_all(tmp_path, 6) == 1
    assert (tmp_path / "lost+found").is_dir()
    assert list((tmp_path / "writing").iterdir()) == []


@pytest.mark.parametrize("left", ["all", "packs", "index", "log of the index"])
def test_stores_made_before_there_was_a_marker_go_on(tmp_path, left):
    fill(tmp_path / "kv", [1])
    directory = tmp_path / "kv"
    if left == "log of the index":  # its writer was killed before the first checkpoint
        with closing(DiskTier(tmp_path / "new", 2**40)):
            shutil.copytree(tmp_path / "new", tmp_path / "killed")
        directory = tmp_path / "killed"
    if left == "packs":
        (directory / "index.sqlite").unlink()
    elif left == "index":
        shutil.rmtree(directory / "packs")
    (directory / MARKER_NAME).unlink(missing_ok=True)
    (directory / "users.txt").write_text("mine")
    with cb.ChunkStore(directory) as store:
        assert (store.get(key_of(1)) is not None) == (left in ("all", "packs"))
        store.put(key_of(2), make_entry(2))
    assert (directory / MARKER_NAME).is_file()
    with cb.ChunkStore(directory) as store:
        assert same(store.get(key_of(2)), make_entry(2))


def test_a_damaged_marker_is_written_anew_and_a_later_one_is_refused(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    marker = tmp_path / MARKER_NAME
    whole = marker.read_bytes()
    for damaged in (b"", whole[:20], bytes([*whole[:-40], whole[-40] ^ 1, *whole[-39:]]), b"[]", b"\xff"):
        marker.write_bytes(damaged)
        assert check_all(tmp_path, 6) == 1
        assert json.loads(marker.read_bytes())["store"].keys() == {"format", "id", "version"}
    marker.unlink()
    monkeypatch.setattr("cacheblend_jax.store.ownership.MARKER_VERSION", 2)
    assert check_all(tmp_path, 6) == 1
    monkeypatch.undo()
    with pytest.raises(cb.CacheBlendError, match="is of format 2, and this version of cacheblend-jax reads format 1"):
        cb.ChunkStore(tmp_path)


def test_the_marker_remembers_a_context_for_each_salt(tmp_path, monkeypatch):
    with cb.ChunkStore(tmp_path) as store:
        assert store.remember_context("after this") == "after this"
    before = json.loads((tmp_path / MARKER_NAME).read_bytes())["store"]
    with cb.ChunkStore(tmp_path, salt="tenant") as tenant:
        assert tenant.remembered_context() is None
        assert tenant.remember_context("another") == "another"
    with cb.ChunkStore(tmp_path) as store:
        assert store.remembered_context() == store.remember_context("late") == "after this"
        after = json.loads((tmp_path / MARKER_NAME).read_bytes())["store"]
        assert after["id"] == before["id"]
        assert sorted(after["contexts"].values()) == ["after this", "another"]
        assert "tenant" not in after["contexts"]  # a salt is nobody's to read
        (tmp_path / MARKER_NAME).write_bytes(b"{}")
        assert store.remembered_context() is None
        (tmp_path / MARKER_NAME).unlink()
        with pytest.raises(cb.CacheBlendError, match="cannot remember a context: No such file"):
            store.remember_context("gone")
    assert cb.ChunkStore().remember_context("in memory") == "in memory"


def test_inside_a_store_only_its_own_is_cleaned(tmp_path):
    directory = tmp_path / "kv"
    fill(directory, range(2), one_by_one=True, tokens=BIG)
    for name in ("writing", "quarantine", "packs"):
        (directory / name / "novel").mkdir()
        (directory / name / "novel" / "chapter.txt").write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "chapter.txt").write_text("mine")
    for name in ("writing", "quarantine"):
        (directory / name / HEX).symlink_to(outside)
    (directory / "writing" / HEX[::-1]).mkdir()  # of a writer that was killed
    (damaged, _) = [path for path in packs(directory) if path.name != "novel"]
    os.truncate(largest_file(damaged), 10)
    assert check_quarantined(directory) == 1
    with closing(DiskTier(directory)) as disk:
        from cacheblend_jax.store.maintenance import prune

        assert prune(disk, quarantined=True)["quarantined_removed"] == 1
    with cb.ChunkStore(directory) as store:
        store.clear()
    report_of(directory, repair=True)
    assert [path.name for path in outside.iterdir()] == ["chapter.txt"]
    for name in ("writing", "quarantine", "packs"):
        assert (directory / name / "novel" / "chapter.txt").read_text() == "mine"
        links = [] if name == "packs" else [HEX]
        assert sorted(path.name for path in (directory / name).iterdir()) == [*links, "novel"]


def check_quarantined(directory: Path) -> int:
    with cb.ChunkStore(directory) as store:
        keys = store.keys()
        assert sum(store.get(key) is None for key in keys) == store.stats.damaged
        return store.stats.damaged


@pytest.mark.parametrize("name", ["packs", "writing", "quarantine"])
def test_a_link_for_a_directory_of_a_store_is_refused(tmp_path, name):
    fill(tmp_path / "kv", [1])
    (tmp_path / "kv" / name).rename(tmp_path / "moved")
    (tmp_path / "kv" / name).symlink_to(tmp_path / "moved")
    before = tree(tmp_path / "moved")
    with pytest.raises(cb.CacheBlendError, match=f"has a symbolic link '{name}' in it, which a store does not follow"):
        cb.ChunkStore(tmp_path / "kv")
    assert tree(tmp_path / "moved") == before


def test_object_storage_lists_nothing_before_there_is_something(tmp_path, monkeypatch):
    monkeypatch.setattr(type(epath.Path(tmp_path)), "mkdir", lambda *_, **__: None)  # where it makes nothing
    log = DiskLog(epath.Path(tmp_path))
    with pytest.raises(FileNotFoundError, match=MARKER_NAME):  # here, at last, a directory is needed
        claim(epath.Path(tmp_path / "kv"), log, local=False)
    (tmp_path / "other").write_text("mine")
    with pytest.raises(cb.CacheBlendError, match="is a directory with other files in it"):
        claim(epath.Path(tmp_path), log, local=False)
    (tmp_path / "other").unlink()
    claim(epath.Path(tmp_path), log, local=False)
    (tmp_path / "other").write_text("mine")
    claim(epath.Path(tmp_path), log, local=False)


def test_a_store_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "kv").symlink_to(tmp_path / "large")
    fill(tmp_path / "kv", [1])
    assert check_all(tmp_path / "large", 6) == check_all(tmp_path / "kv", 6) == 1
