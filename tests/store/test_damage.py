"""Damaged entries that cannot be quarantined just now."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

from store_cases import BIG, fill, key_of, largest_file, make_entry, packs, same

from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.entry import QueuedEntry


def locked(*_, **__):
    raise sqlite3.OperationalError("database is locked")


def test_an_entry_that_could_not_be_quarantined_is_written_anew(tmp_path, monkeypatch):
    fill(tmp_path, [1], tokens=BIG)
    (damaged,) = packs(tmp_path)
    os.truncate(largest_file(damaged), 10)
    with closing(DiskTier(tmp_path)) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(disk.index, "remove", locked)
            assert disk.load(key_of(1)) is None
        assert disk.load(key_of(1)) is None  # it is still in the index
        disk.write([QueuedEntry(key_of(1), make_entry(1, BIG))])
        assert same(disk.load(key_of(1))[0], make_entry(1, BIG))
        assert (disk.stats().written, disk.stats().entries) == (1, 1)
        assert damaged not in packs(tmp_path)
