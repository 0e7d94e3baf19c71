"""KV heads read alone: the bits of the whole entry, from every tier, of little more than their bytes, each checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from faults.directory import flip, head_flips
from store_cases import DIM, HEADS, LAYERS, fill, key_of, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.engine.shared_reads import SharedReads
from cacheblend_jax.store import DeviceEntry
from cacheblend_jax.store.head_groups import num_groups
from cacheblend_jax.store.quantise import QuantisedRows
from cacheblend_jax.store.stored_chunk import of_heads

OLD_STORE = Path(__file__).parents[1] / "data" / "store-versions-1-and-2"


def entry_of(kv_heads: int, tokens: int = 5, head_dim: int = 4) -> cb.ChunkEntry:
    rng = np.random.default_rng(kv_heads)
    k, v = (rng.standard_normal((2, tokens, kv_heads, head_dim), np.float32) for _ in range(2))
    return cb.ChunkEntry(k, v, k_offset=np.full((2, kv_heads, head_dim), 3, np.float32))


def bits(rows) -> list[bytes]:
    arrays = rows if isinstance(rows, QuantisedRows) else [rows]
    return [np.asarray(array).tobytes() for array in arrays if array is not None]


def to_device(entry: cb.ChunkEntry) -> DeviceEntry:
    return DeviceEntry(*map(jax.device_put, (entry.k, entry.v)), entry.num_tokens)


def slices(kv_heads: int) -> list[range]:
    return [range(first, stop) for first in range(kv_heads) for stop in range(first + 1, kv_heads + 1)]


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 1), (2, 2), (6, 6), (11, 1), (16, 8), (30, 6)])
def test_a_layers_heads_are_in_as_many_equal_groups_as_can_be_up_to_eight(kv_heads, groups):
    assert num_groups(kv_heads) == groups


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kv_heads", [1, 3, 11, 16])
def test_some_heads_are_those_of_the_whole_layer_from_every_tier(tmp_path, kv_heads, kv_dtype):
    with cb.ChunkStore(tmp_path, kv_dtype=kv_dtype) as store:
        store.put("a", entry_of(kv_heads))
        store.flush()
    wanted = entry_of(kv_heads).quantised(kv_dtype)
    with cb.ChunkStore(tmp_path, device_bytes=2**20) as store:
        for tier in ("disk", "host", *(() if kv_dtype else ("device",))):
            with store.open("a") as chunk:
                assert chunk.tier == tier
                for heads in slices(kv_heads)[::5]:
                    for read, whole in zip(chunk.read_layer(1, heads), wanted.layer(1), strict=True):
                        assert bits(read) == bits(of_heads(whole, heads))
                for read, whole in zip(chunk.read_layer(1), wanted.layer(1), strict=True):
                    assert bits(read) == bits(whole)
                for wrong in (range(kv_heads + 1), range(0), range(-1, 1), range(0, 2 * kv_heads, 2)):
                    with pytest.raises(IndexError, match=rf"heads must be consecutive and in \[0, {kv_heads - 1}\]"):
                        chunk.read_layer(1, wrong)
            store.promote("a", to_device if tier == "host" else None)
        assert same(store.get("a"), wanted)
    assert report_of(tmp_path)["problems"] == []


def bytes_read() -> int:
    metric = "/tensorstore/kvstore/file/bytes_read"
    (found,) = ts.experimental_collect_matching_metrics(metric)
    return found["values"][0]["value"]


def test_a_host_reads_little_more_than_the_bytes_of_its_heads(tmp_path):
    entry = entry_of(8, tokens=100, head_dim=64)
    with cb.ChunkStore(tmp_path) as store:
        store.put("a", entry)
    with cb.ChunkStore(tmp_path) as store, store.open("a") as chunk:
        chunk.read_layer(0)
        before = bytes_read()
        chunk.read_layer(1, range(6, 8))
        assert bytes_read() - before == entry.k[1].nbytes // 4 * 2


def test_damage_is_seen_by_the_hosts_that_read_the_damaged_head_alone(tmp_path):
    wanted = entry_of(4, tokens=50)
    with cb.ChunkStore(tmp_path) as store:
        store.put("a", wanted)
    damaged = np.ascontiguousarray(wanted.v[1, :, 3]).tobytes()
    (pack,) = packs(tmp_path)
    data = next(path for path in pack.rglob("*") if path.is_file() and damaged in path.read_bytes())
    flip(data, data.read_bytes().index(damaged) + 300, 5)
    with cb.ChunkStore(tmp_path) as first, cb.ChunkStore(tmp_path) as second:
        with first.open("a") as of_first, second.open("a") as of_second:
            for read, whole in zip(of_first.read_layer(1, range(2)), wanted.layer(1), strict=True):
                assert bits(read) == bits(whole[:, :2])
            with pytest.raises(cb.DamagedEntryError, match="layer 1 of entry a has a wrong checksum"):
                of_second.read_layer(1, range(2, 4))
        assert (first.stats.damaged, second.stats.damaged) == (0, 1)
        assert first.open("a") is second.open("a") is None


@pytest.mark.once
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_flipped_bits_are_never_served_to_hosts_that_read_some_heads(tmp_path, kv_dtype):
    assert head_flips(tmp_path, range(12), kv_dtype=kv_dtype)["found_by_reads"] > 2


def test_entries_of_older_versions_are_read_whole_checked_and_cut(tmp_path):
    shutil.copytree(OLD_STORE, tmp_path / "kv")
    bias = np.full((LAYERS, HEADS, DIM), 2, np.float32)
    plain, given = make_entry(1), make_entry(2)
    wanted = {1: plain, 2: cb.ChunkEntry(given.k, given.v, k_offset=bias).quantised("int8")}
    with cb.ChunkStore(tmp_path / "kv") as store:
        for seed, entry in wanted.items():
            with store.open(key_of(seed)) as chunk:
                for heads in (range(1), range(1, 2), range(2)):
                    for read, whole in zip(chunk.read_layer(2, heads), entry.layer(2), strict=True):
                        assert bits(read) == bits(of_heads(whole, heads))
            assert same(store.get(key_of(seed)), entry)
        assert (store.stats.damaged, store.stats.outdated) == (0, 0)
    assert report_of(tmp_path / "kv")["problems"] == []


def test_damage_to_any_head_of_an_older_entry_is_seen_by_all(tmp_path):
    shutil.copytree(OLD_STORE, tmp_path / "kv")
    row = make_entry(1).v[1, 3, 1].tobytes()
    data = next(path for path in tmp_path.rglob("*") if path.is_file() and row in path.read_bytes())
    flip(data, data.read_bytes().index(row), 2)
    with cb.ChunkStore(tmp_path / "kv") as store, store.open(key_of(1)) as chunk:
        with pytest.raises(cb.DamagedEntryError, match="wrong checksum"):
            chunk.read_layer(1, range(1))
        assert store.stats.damaged == 1


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_older_releases_take_entries_in_groups_for_another_versions(tmp_path, monkeypatch, kv_dtype):
    fill(tmp_path, [1], kv_dtype=kv_dtype)
    with cb.ChunkStore(tmp_path, kv_dtype=kv_dtype) as store:
        store.put(key_of(2), entry_of(1))  # of one head: as older releases write it
    versions = {}
    for pack in packs(tmp_path):
        body = json.loads((pack / "entries.json").read_text())["pack"]
        versions |= {record["key"]: (body["version"], record["version"]) for record in body["entries"]}
    of_one_head = 2 if kv_dtype else 1
    assert versions == {key_of(1): (3, 3), key_of(2): (of_one_head, of_one_head)}
    monkeypatch.setattr("cacheblend_jax.store.record.READABLE_VERSIONS", (1, 2))
    monkeypatch.setattr("cacheblend_jax.store.head_groups.MOST_GROUPS", 1)
    for index_lost in (False, True):
        if index_lost:
            (tmp_path / "index.sqlite").unlink()
        with cb.ChunkStore(tmp_path) as store:
            assert store.get(key_of(1)) is None
            assert store.get(key_of(2)) is not None
            assert (store.stats.outdated, store.stats.damaged) == (1, 0)
    with cb.ChunkStore(tmp_path) as store:
        store.put(key_of(1), make_entry(1))
    monkeypatch.undo()
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get(key_of(1)), make_entry(1))


def test_a_throttled_tier_takes_the_time_of_the_heads_bytes():
    waited = []
    store = cb.store.ThrottledStore(cb.ChunkStore(), 1e3, clock=lambda: 0.0, sleep=waited.append)
    store.put("a", entry_of(4))
    with store.open("a") as chunk:
        layer_bytes = chunk.num_bytes // chunk.num_layers
        k, _ = chunk.read_layer(0, range(1, 2))
    assert k.shape == (5, 1, 4)
    assert waited == [pytest.approx(layer_bytes / 4 / 1e3)]


def test_prefills_that_share_reads_share_those_of_the_same_heads(tmp_path):
    with cb.ChunkStore(tmp_path) as store:
        store.put("a", entry_of(4))
    with cb.ChunkStore(tmp_path) as store, SharedReads(store, {"a": 2}) as reads, reads.open("a") as chunk:
        first = chunk.read_layer(0, range(2))
        assert chunk.read_layer(0, range(2)) is first
        assert chunk.read_layer(0, range(2, 4))[0].tobytes() == entry_of(4).k[0, :, 2:].tobytes()
        assert chunk.tier == "disk"
        chunk.read_layer(1, range(2))
        assert chunk.tier == "host"
