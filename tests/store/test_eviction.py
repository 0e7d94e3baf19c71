"""Which packs make room for others: none that stays all the same, and none is forgotten that does."""

from __future__ import annotations

import os
import shutil
from contextlib import closing

from store_cases import fill, key_of, packs

from cacheblend_jax.store import eviction
from cacheblend_jax.store.disk import DiskTier


def test_another_users_packs_are_not_evicted(tmp_path, monkeypatch):
    """They could be taken out of the index, but not removed."""
    fill(tmp_path, range(3), one_by_one=True)
    access = os.access
    with closing(DiskTier(tmp_path)) as disk:
        theirs = tmp_path / "packs" / disk.index.in_order()[0]
        monkeypatch.setattr(os, "access", lambda path, mode: path != theirs and access(path, mode))
        assert not eviction.make_room(disk.places, disk.index, disk.log, 1)
        assert (packs(tmp_path), disk.index.packs("ready")) == ([theirs], [theirs.name])
        assert disk.load(key_of(0)) is not None
        assert disk.stats().evicted == 2


def test_packs_in_use_do_not_keep_those_after_them_from_being_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.index.CANDIDATES", 2)
    fill(tmp_path, range(5), one_by_one=True)
    with closing(DiskTier(tmp_path)) as disk:
        with disk.open(key_of(0)), disk.open(key_of(1)), disk.open(key_of(2)):
            assert not eviction.make_room(disk.places, disk.index, disk.log, 1)
            assert (len(packs(tmp_path)), disk.stats().evicted) == (3, 2)
        assert eviction.make_room(disk.places, disk.index, disk.log, 1)
        assert packs(tmp_path) == []


def test_a_file_in_the_place_of_a_pack_stops_no_eviction(tmp_path):
    fill(tmp_path, range(2), one_by_one=True)
    with closing(DiskTier(tmp_path)) as disk:
        in_place = tmp_path / "packs" / disk.index.in_order()[0]
        shutil.rmtree(in_place)
        in_place.write_text("mine")
        assert not eviction.make_room(disk.places, disk.index, disk.log, 1)
        assert in_place.read_text() == "mine"
        assert packs(tmp_path) == [in_place]
