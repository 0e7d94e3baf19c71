"""Object storage that is not there: its clients raise errors that are no `OSError`, the store does."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
from etils import epath
from etils.epath.gpath import PosixGPath
from store_cases import key_of, make_entry, packs

import cacheblend_jax as cb
from cacheblend_jax.store import packing
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.object_path import ObjectPath
from cacheblend_jax.store.places import located


class EndpointConnectionError(Exception):
    """As botocore's."""


class Unreachable:
    """A file system whose every call fails."""

    def __getattr__(self, _):
        def fail(*_, **__):
            raise EndpointConnectionError("Could not connect")

        return fail


CALLS = {
    "exists": lambda path: path.exists(),
    "is_dir": lambda path: path.is_dir(),
    "iterdir": lambda path: path.iterdir(),
    "mkdir": lambda path: path.mkdir(parents=True, exist_ok=True),
    "rmtree": lambda path: path.rmtree(),
    "unlink": lambda path: path.unlink(missing_ok=True),
    "stat": lambda path: path.stat(),
    "read": lambda path: path.read_bytes(),
    "write": lambda path: path.write_bytes(b""),
}


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(PosixGPath, "_backend", Unreachable())


@pytest.mark.parametrize("call", CALLS)
def test_what_a_client_raises_is_an_os_error(unreachable, call):
    path = located("s3://bucket/kv") / "packs"
    assert isinstance(epath.Path(path), ObjectPath)  # as Orbax takes it
    assert str(path) == "s3://bucket/kv/packs"
    with pytest.raises(OSError, match="s3://bucket/kv/packs: EndpointConnectionError: Could not connect"):
        CALLS[call](path)


def test_a_store_that_cannot_be_reached_says_so(unreachable):
    with pytest.raises(cb.CacheBlendError, match=r"store 's3://bucket/kv' cannot be reached: .*Could not connect"):
        cb.ChunkStore("s3://bucket/kv")


def test_a_write_that_a_client_fails_is_counted(tmp_path, monkeypatch):
    def fail(*_):
        raise EndpointConnectionError("Could not connect")

    monkeypatch.setattr(packing, "write_pack", fail)
    with closing(DiskTier(tmp_path)) as disk:
        disk.places = replace(disk.places, local=False)
        disk.write([QueuedEntry(key_of(1), make_entry(1))])
        assert (disk.stats().written, disk.stats().write_errors) == (0, 1)


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("s3://bucket/kv: EndpointConnectionError: Could not connect")

    with cb.ChunkStore(tmp_path) as store:
        store.put(key_of(1), make_entry(1))
        store.flush()
        monkeypatch.setattr(DiskTier, "changed", fail)
        for remove in (lambda: store.remove(key_of(1)), store.clear):
            with pytest.raises(cb.CacheBlendError, match=r"entries cannot be removed: .*Could not connect; try again"):
                remove()
        monkeypatch.undo()


@pytest.mark.parametrize("reachable", [True, False])
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, reachable):
    def half(path, *_):
        path.mkdir()
        (path / "state").write_bytes(b"half")
        raise EndpointConnectionError("reset")

    def fail(*_, **__):
        raise OSError("Could not connect")

    monkeypatch.setattr(packing, "write_pack", half)
    with closing(DiskTier(tmp_path)) as disk:
        disk.places = replace(disk.places, local=False)
        if not reachable:
            monkeypatch.setattr(type(disk.places.root), "rmtree", fail)
        disk.write([QueuedEntry(key_of(1), make_entry(1))])
        assert (disk.stats().write_errors, disk.index.packs("writing")) == (1, [])
    assert len(packs(tmp_path)) == (not reachable)
