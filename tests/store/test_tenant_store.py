"""A store that tenants share: quotas bound each by itself, and what is pinned is never evicted."""

from __future__ import annotations

import numpy as np
import pytest
from store_cases import BIG, make_entry, packs, same

import cacheblend_jax as cb
from cacheblend_jax.store import Store, TenantStore
from cacheblend_jax.store.keys import chunk_key

SIZE = make_entry(0).num_bytes


def key_for(number: int, tenant: str = "one") -> str:
    return chunk_key("model", np.zeros(0, np.int32), np.array([number]), tenant=tenant)


def put(store: TenantStore, numbers, tenant: str = "one", tokens: int = 6) -> list[bool]:
    return [store.put(key_for(number, tenant), make_entry(number, tokens), wait=True) for number in numbers]


def held(store: TenantStore, tenant: str = "one") -> set[int]:
    return {number for number in range(20) if key_for(number, tenant) in store}


@pytest.fixture(params=["memory", "disk"])
def directory(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "kv"


def test_a_tenant_store_is_a_store(tmp_path):
    with TenantStore(cb.ChunkStore(tmp_path, salt="mine", device_bytes=2**10)) as store:
        assert isinstance(store, Store)
        assert (store.salt, store.directory, store.device_bytes) == ("mine", tmp_path, 2**10)
        assert store.tiers == ("device", "host", "disk")


def test_a_quota_evicts_the_tenants_own_entries_alone(directory):
    with TenantStore(cb.ChunkStore(directory), {"one": 3 * SIZE}) as store:
        assert all(put(store, range(5), "two"))
        assert all(put(store, range(3)))
        store.flush()
        assert store.get(key_for(0)) is not None  # used last
        store.flush()
        assert put(store, [3]) == [True]
        assert held(store) == {0, 2, 3}
        assert held(store, "two") == {0, 1, 2, 3, 4}
        assert store.sizes_of("one") == {key_for(number): SIZE for number in (0, 2, 3)}


def test_a_quota_counts_what_another_thread_is_storing(monkeypatch):
    with TenantStore(cb.ChunkStore(), {"one": 3 * SIZE}) as store:
        put(store, range(2))
        put_now, meanwhile = store.wrapped.put, [3]

        def put_after_others(*arguments, **options):
            while meanwhile:
                assert put(store, [meanwhile.pop()]) == [True]
            return put_now(*arguments, **options)

        monkeypatch.setattr(store.wrapped, "put", put_after_others)
        assert put(store, [2]) == [True]
        assert held(store) == {1, 2, 3}


def test_a_quota_counts_what_waits_to_be_written(tmp_path, monkeypatch):
    with TenantStore(cb.ChunkStore(tmp_path, host_bytes=2 * SIZE), {"one": 3 * SIZE}) as store:
        with monkeypatch.context() as patch:
            patch.setattr("cacheblend_jax.store.writeback.WriteBack._wake", lambda self: True)  # a writer that is late
            kept = put(store, range(6))
            sizes = store.sizes_of("one")
        store.put(key_for(6, "two"), make_entry(6))  # wakes the writer
        assert kept == [True] * 6
        assert sizes == {key_for(number): SIZE for number in (3, 4, 5)}
        assert store.pin(key_for(3))
        assert held(store) == {3, 4, 5}


def test_a_quota_evicts_what_was_renewed_after_the_others(directory):
    with TenantStore(cb.ChunkStore(directory), {"one": 3 * SIZE}) as store:
        put(store, range(3))
        store.flush()
        store.renew([key_for(0)])
        assert put(store, [3]) == [True]
        assert held(store) == {0, 2, 3}


def test_a_quota_counts_the_bytes_that_are_stored():
    quantised = make_entry(0).quantised("int8").num_bytes
    assert 3 * quantised < 2 * SIZE
    with TenantStore(cb.ChunkStore(kv_dtype="int8"), {"one": 3 * quantised}) as store:
        assert put(store, range(3)) == [True] * 3
        assert held(store) == {0, 1, 2}


def test_a_quota_counts_what_the_directory_holds_already(tmp_path):
    with TenantStore(cb.ChunkStore(tmp_path)) as store:
        put(store, range(3))
    with TenantStore(cb.ChunkStore(tmp_path), {"one": 3 * SIZE}) as store:
        assert put(store, [3]) == [True]
        assert len(held(store)) == 3


def test_an_entry_beyond_a_quota_is_not_stored_and_costs_no_other():
    with TenantStore(cb.ChunkStore(), {"one": 3 * SIZE}) as store:
        put(store, range(2))
        assert put(store, [2], tokens=6 * 4) == [False]
        assert held(store) == {0, 1}


def test_what_others_had_to_make_room_for_does_not_count_to_a_quota():
    with TenantStore(cb.ChunkStore(host_bytes=4 * SIZE), {"one": 3 * SIZE}) as store:
        put(store, range(3))
        put(store, range(4), "two")
        assert held(store) == set()
        assert put(store, [3]) == [True]


def test_pinned_entries_are_never_evicted(directory):
    room = 4 * make_entry(0, BIG).num_bytes
    bounds = {"host_bytes": room} if directory is None else {"host_bytes": 2**20, "disk_bytes": room}
    with TenantStore(cb.ChunkStore(directory, **bounds)) as store:
        put(store, [0], tokens=BIG)
        assert store.pin(key_for(0))
        for number in range(1, 9):  # each in a pack of its own
            put(store, [number], tokens=BIG)
            store.flush()
        if directory is not None:
            assert len(packs(directory)) < 5
    with TenantStore(cb.ChunkStore(directory, **bounds)) if directory else store as later:
        found = later.get(key_for(0))
        assert same(found, make_entry(0, BIG))


def test_an_unpinned_entry_is_evicted_as_any_other():
    with TenantStore(cb.ChunkStore(host_bytes=3 * SIZE)) as store:
        put(store, [0])
        assert store.pin(key_for(0))
        assert store.pinned == {key_for(0): SIZE}
        assert store.unpin(key_for(0))
        assert not store.unpin(key_for(0))
        put(store, range(1, 4))
        assert held(store) == {1, 2, 3}


def test_pins_are_bounded_and_keep_an_entry_from_being_removed():
    with TenantStore(cb.ChunkStore(), pinned_bytes=2 * SIZE) as store:
        put(store, range(3))
        assert not store.pin(key_for(9))
        assert store.pin(key_for(0))
        assert store.pin(key_for(0))  # again: it counts once
        assert store.pin(key_for(1))
        with pytest.raises(cb.CacheBlendError, match="no room to pin"):
            store.pin(key_for(2))
        with pytest.raises(cb.CacheBlendError, match="is pinned; unpin it first"):
            store.remove(key_for(0))
        store.unpin(key_for(0))
        assert store.remove(key_for(0))


def test_a_tenants_pins_leave_the_others_their_share():
    with TenantStore(cb.ChunkStore(), pinned_bytes=4 * SIZE, tenants=2) as store:
        put(store, range(3))
        put(store, range(3), "two")
        assert all(store.pin(key_for(number)) for number in range(2))
        with pytest.raises(cb.CacheBlendError, match=f"of together {2 * SIZE} bytes can be pinned"):
            store.pin(key_for(2))
        assert all(store.pin(key_for(number, "two")) for number in range(2))


def test_a_pin_holds_for_what_is_stored_in_the_place_of_a_lost_entry(directory):
    room = 4 * make_entry(0, BIG).num_bytes
    bounds = {"host_bytes": room} if directory is None else {"host_bytes": 2**20, "disk_bytes": room}
    with TenantStore(cb.ChunkStore(directory, **bounds)) as store:
        put(store, [0], tokens=BIG)
        assert store.pin(key_for(0))
        store.wrapped.remove(key_for(0))  # as where it is found damaged
        assert not store.pin(key_for(0))
        for number in (0, *range(1, 9)):
            put(store, [number], tokens=BIG)
            store.flush()
        assert same(store.get(key_for(0)), make_entry(0, BIG))
        assert store.unpin(key_for(0))


def test_a_quota_leaves_what_is_pinned():
    with TenantStore(cb.ChunkStore(), {"one": 2 * SIZE}) as store:
        put(store, range(2))
        store.pin(key_for(0))
        assert put(store, [2]) == [True]
        assert held(store) == {0, 2}
        store.pin(key_for(2))
        assert put(store, [3]) == [False]


def test_what_waits_to_be_written_is_counted(tmp_path, monkeypatch):
    with cb.ChunkStore(tmp_path) as store:
        monkeypatch.setattr(store._disk.queue, "_write", lambda batch: waiting.append(store.stats.queued_bytes))
        waiting: list[int] = []
        store.put(key_for(0), make_entry(0))
        store.flush()
        assert (waiting, store.stats.queued_bytes) == ([SIZE], 0)


def test_a_quota_that_nothing_can_be_removed_for_has_no_room(tmp_path, monkeypatch):
    with cb.ChunkStore(tmp_path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # a directory that this process may only read
        with TenantStore(cb.ChunkStore(tmp_path), {"one": 2 * SIZE}) as store:
            assert put(store, range(5)) == [True, True, False, False, False]
            assert held(store) == {0, 1}
