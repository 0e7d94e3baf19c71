"""What every store offers an engine: the protocol's methods, the tiers that it may serve from, and its handles."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.store import DeviceEntry, Store, StoredChunk

ENTRY = cb.ChunkEntry(*(np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2) for _ in range(2)))


def to_device(entry: cb.ChunkEntry) -> DeviceEntry:
    return DeviceEntry(*(jax.device_put(array) for array in (entry.k, entry.v)), entry.num_tokens)


@pytest.mark.parametrize("throttled", [False, True])
def test_stores_satisfy_the_protocol_and_can_be_closed_by_a_with(tmp_path, throttled):
    store = cb.ChunkStore(tmp_path, salt="mine", host_bytes=2**20, device_bytes=2**10)
    with cb.store.ThrottledStore(store, 1e12) if throttled else store as opened:
        assert isinstance(opened, Store)
        assert (opened.salt, opened.directory, opened.host_bytes) == ("mine", tmp_path, 2**20)
        assert opened.device_bytes == (0 if throttled else 2**10)
        opened.check_writable()
        assert opened.put("a", ENTRY, wait=True, uses=0)
        opened.promote("a")
        opened.renew(["a", "b"])
        opened.flush()
        assert ("a" in opened, "b" in opened, len(opened), opened.keys()) == (True, False, 1, ["a"])
        assert opened.get("a").k.tobytes() == ENTRY.k.tobytes()
        with opened.open("a") as chunk:
            assert isinstance(chunk, StoredChunk)
        assert (opened.stats.written, opened.stats.hits, opened.remove("a"), len(opened)) == (1, 2, True, 0)
        assert opened.put("a", ENTRY)
        assert opened.remembered_context() is None
        assert opened.remember_context("first") == opened.remember_context("second") == "first"
        assert opened.remembered_context() == "first"
    with cb.ChunkStore(tmp_path, salt="mine") as later:  # closing wrote it
        assert later.keys() == ["a"]


def test_a_store_names_the_tiers_that_it_may_serve_from(tmp_path):
    with cb.ChunkStore(tmp_path, device_bytes=1) as store:
        assert store.tiers == ("device", "host", "disk")
        assert cb.store.ThrottledStore(store, 1.0).tiers == ("disk",)
        assert cb.store.ThrottledStore(store, 1.0, tier="network").tiers == ("network",)
    with cb.ChunkStore(tmp_path) as store:
        assert store.tiers == ("host", "disk")
    assert cb.ChunkStore().tiers == ("host",)


def test_only_a_handle_on_the_device_gives_the_entry_there(tmp_path):
    with cb.ChunkStore(tmp_path) as store:
        store.put("a", ENTRY)
    with cb.ChunkStore(tmp_path, device_bytes=2**20) as store:
        for tier in ("disk", "host", "device"):
            with store.open("a") as chunk, cb.store.ThrottledStore(store, 1e12, tier="network").open("a") as throttled:
                assert (chunk.tier, throttled.tier) == (tier, "network")
                assert (chunk.device_entry is not None) == (tier == "device")
                assert throttled.device_entry is None
            store.promote("a", to_device if tier == "host" else None)
        stats = store.stats
        assert (stats.disk.hits, stats.host.hits, stats.device.hits, stats.hits) == (2, 2, 2, 6)
