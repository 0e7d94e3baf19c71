"""Reads that fail: a directory is left alone after a few, and descriptors are bounded whatever is in use."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from etils import epath
from store_cases import fill, key_of, make_entry, packs, same

import cacheblend_jax as cb
from cacheblend_jax.store.breaker import Breaker, State
from cacheblend_jax.store.entry_reader import EntryReader, UnreadableError
from cacheblend_jax.store.open_packs import OpenPacks
from cacheblend_jax.store.pins import BusyError, Pin
from cacheblend_jax.store.record import storage_name


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The time that the breakers of new stores go by."""
    clock = Clock()
    monkeypatch.setattr("cacheblend_jax.store.disk.Breaker", lambda: Breaker(clock=clock))
    return clock


@pytest.fixture
def failing(monkeypatch) -> list[int]:
    """While it holds anything, reads of layers fail; counts those tried."""
    read, tried = EntryReader.read_layer, []

    def read_layer(self, layer, heads=None):
        if tried:
            tried.append(layer)
            raise UnreadableError("UNAVAILABLE: the mount is gone")
        return read(self, layer, heads)

    monkeypatch.setattr(EntryReader, "read_layer", read_layer)
    monkeypatch.setattr(EntryReader, "read", whole)
    return tried


def whole(reader) -> cb.ChunkEntry:
    layers = [reader.read_layer(layer) for layer in range(3)]
    return cb.ChunkEntry(*(np.stack(arrays) for arrays in zip(*layers, strict=True)))


def test_a_breaker_opens_after_failures_in_a_row_and_closes_with_a_probe_that_succeeds():
    clock = Clock()
    breaker = Breaker(max_failures=2, pause_s=30.0, clock=clock)
    assert [breaker.failed(), breaker.succeeded(), breaker.failed()] == [False, False, False]  # not in a row
    assert breaker.is_closed
    assert not breaker.wants_probe()
    assert breaker.failed()
    assert breaker.state is State.OPEN
    clock.now += 29.0
    assert not breaker.wants_probe()
    clock.now += 1.0
    assert [breaker.wants_probe(), breaker.wants_probe()] == [True, False]  # one caller alone
    assert breaker.state is State.PROBING
    assert not breaker.failed()  # it was not closed
    assert breaker.state is State.OPEN
    clock.now += 30.0
    assert breaker.wants_probe()
    clock.now += 30.0
    assert breaker.wants_probe()  # nothing was heard of the probe before
    assert breaker.succeeded()
    assert breaker.is_closed
    assert not breaker.failed()  # it counts from zero again


def test_a_directory_whose_reads_fail_is_left_alone_until_a_probe_succeeds(
    tmp_path, clock, failing, monkeypatch, caplog
):
    fill(tmp_path, range(5))
    with cb.ChunkStore(tmp_path) as store:
        monkeypatch.setattr(store._disk.queue, "run_soon", lambda name, chore: chore())
        failing.append(-1)
        for seed in range(3):
            with store.open(key_of(seed)) as chunk:
                for layer in (0, 1):  # of an entry, one failure counts
                    with pytest.raises(cb.DamagedEntryError, match="the mount is gone"):
                        chunk.read_layer(layer)
        assert caplog.text.count("reading has failed repeatedly") == 1
        assert (store.stats.read_errors, store.stats.skipped, len(failing)) == (3, 0, 7)
        assert store.open(key_of(0)) is None
        assert store.get(key_of(4)) is None
        assert key_of(0) not in store  # so that it is computed anew, and kept in memory
        assert store.put(key_of(0), make_entry(0))
        assert same(store.get(key_of(0)), make_entry(0))
        store.flush()
        assert (store.stats.skipped, store.stats.disk.entries, len(failing)) == (2, 5, 7)
        clock.now += 30.0
        assert store.open(key_of(1)) is None  # the probe fails
        assert len(failing) == 8
        failing.clear()
        assert store.open("nowhere") is None
        clock.now += 30.0
        assert store.open("nowhere") is None  # the probe reads another entry
        assert "reading succeeds again" in caplog.text
        assert same(store.get(key_of(1)), make_entry(1))
        failing.append(-1)
        for seed in (2, 3, 4):
            assert store.get(key_of(seed)) is None
        assert caplog.text.count("reading has failed repeatedly") == 2  # once for each time
        assert store.stats.damaged == 0


def pins(directory, wanted: int) -> int:
    """Returns how many of this process's descriptors are of packs, once they are as many as wanted, or after a while.

    Those of files in them don't count: TensorStore's threads close what they have read in their own time. The store's
    own threads may hold a pack for a moment, too.
    """
    gives_up_at = time.monotonic() + 30
    while (count := descriptors(directory)) != wanted and time.monotonic() < gives_up_at:
        time.sleep(0.01)
    return count


def descriptors(directory) -> int:
    """Returns how many of this process's descriptors are of packs right now."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(os.path.dirname(path) == str(directory / "packs") for path in paths)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")
@pytest.mark.parametrize("one_by_one", [False, True])
def test_entries_in_use_take_a_descriptor_a_pack_and_a_bounded_number(tmp_path, monkeypatch, one_by_one):
    fill(tmp_path, range(8), one_by_one=one_by_one)
    packs_in_use = 3 if one_by_one else 1
    with cb.ChunkStore(tmp_path) as store:
        monkeypatch.setattr(store._disk.disk, "_open_packs", OpenPacks(limit=3))
        chunks = [store.open(key_of(seed)) for seed in [*range(8), *range(8)]]
        assert pins(tmp_path, packs_in_use) == packs_in_use
        for layer in range(3):
            for seed, chunk in zip([*range(8), *range(8)], chunks, strict=True):
                assert chunk.read_layer(layer)[0].tobytes() == make_entry(seed).k[layer].tobytes()
        assert pins(tmp_path, packs_in_use) == packs_in_use
        for chunk in chunks:
            chunk.close()
        assert pins(tmp_path, 0) == 0
        assert same(whole(chunks[0]), make_entry(0))
        assert pins(tmp_path, 0) == 0


def test_an_entry_evicted_between_two_reads_is_lost_and_no_damage(tmp_path, monkeypatch):
    fill(tmp_path, range(2), one_by_one=True)
    with cb.ChunkStore(tmp_path) as store:
        monkeypatch.setattr(store._disk.disk, "_open_packs", OpenPacks(limit=1))
        with store.open(key_of(0)) as first, store.open(key_of(1)) as second:
            pack = store._disk.disk.index.find(storage_name(key_of(0))).pack
            with (
                Pin(tmp_path / "packs" / pack, alone=True),  # as whoever is evicting it
                pytest.raises(cb.DamagedEntryError, match="was evicted before it was read"),
            ):
                first.read_layer(0)
            assert store.stats.read_errors == 0
            for pack in packs(tmp_path):
                shutil.rmtree(pack)
            with pytest.raises(cb.DamagedEntryError, match="was evicted before it was read"):
                first.read_layer(0)
            assert store.stats.read_errors == store.stats.damaged == 0
            with pytest.raises(cb.DamagedEntryError):  # its pack was held: somebody else has removed it
                second.read_layer(0)
            assert store.stats.damaged == 1


def test_packs_being_read_do_not_count_to_the_limit(tmp_path):
    fill(tmp_path, range(5), one_by_one=True)
    paths, opened = [epath.Path(path) for path in packs(tmp_path)], OpenPacks(limit=2)
    handles = [opened.hold(path) for path in paths]
    with handles[0].reading(), handles[1].reading(), handles[2].reading():
        for handle in handles[3:]:
            with handle.reading():
                pass
        for path in paths:
            with pytest.raises(BusyError):
                Pin(path, alone=True)
    assert sum(is_pinned(path) for path in paths) == 2
    for handle in handles:
        handle.close()
    assert not any(map(is_pinned, paths))


def is_pinned(path) -> bool:
    try:
        Pin(path, alone=True).close()
    except BusyError:
        return True
    return False


def test_what_is_evicted_before_it_is_held_is_not_held(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with cb.ChunkStore(tmp_path, host_bytes=1) as store:
        opened = store._disk.disk._open_packs

        @contextmanager
        def evicted(pack):
            raise FileNotFoundError(pack.path)
            yield

        monkeypatch.setattr(opened, "reading", evicted)
        assert store.hold(key_of(1)) is None
        assert not opened._held
        monkeypatch.undo()
        monkeypatch.setattr("cacheblend_jax.store.disk_chunk.DiskChunk.keep", lambda *_: False)
        assert store.hold(key_of(1)) is None
