"""Quantised entries: how far codes are from values, outliers, bytes, damage, crashes, and stores of both kinds."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from faults.directory import flip, kills, quantised_flips
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from orbax.checkpoint import v1 as ocp
from store_cases import BIG, DIM, HEADS, LAYERS, fill, key_of, make_entry, packs, report_of, same

import cacheblend_jax as cb
from cacheblend_jax.store.quantise import SCALES, quantise_rows

KV_DTYPES = ("int8", "float8_e4m3fn")
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
MODERATE = float(np.finfo(np.float32).max) / 2


def values(seed: int, dtype=np.float32, head_dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((LAYERS, 50, HEADS, head_dim)).astype(dtype) for _ in "kv")
    return k, v


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    rows=npst.arrays(
        np.float32, (3, 2, 8), elements=st.floats(-MODERATE, MODERATE, width=32, allow_subnormal=True), fill=st.just(0)
    )
)
def test_a_code_is_off_by_at_most_half_a_step(kv_dtype, rows):
    codes = quantise_rows(rows, kv_dtype)
    off = np.abs(codes.dequantised(np.dtype(np.float32)).astype(np.float64) - rows)
    scale = codes.scales.astype(np.float64)[..., None]
    step = scale if kv_dtype == "int8" else np.maximum(np.abs(rows) / 8, scale * 2.0**-9)
    # The largest value of a row may be beyond the last code by what its scale was rounded; and what is too small for a
    # normal scale is zero.
    assert (off <= step / 2 * (1 + 1e-5) + 127 * np.finfo(np.float32).tiny * 4).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_key_bias_of_300_in_float16_neither_overflows_nor_ruins_the_other_channels(kv_dtype):
    k, v = values(1)
    bias = np.zeros((LAYERS, HEADS, 64), np.float16)
    bias[..., 5] = 300
    biased = cb.ChunkEntry((k + bias[:, None].astype(np.float32)).astype(np.float16), v.astype(np.float16))
    entry = cb.ChunkEntry(biased.k, biased.v, k_offset=bias).quantised(kv_dtype).dequantised()
    off = np.abs(entry.k.astype(np.float32) - biased.k.astype(np.float32))
    assert off[..., 5].max() <= 0.5  # float16 has steps of a quarter there
    assert off[..., :5].max() < (0.03 if kv_dtype == "int8" else 0.2)
    ruined = np.abs(biased.quantised("int8").dequantised().k.astype(np.float32) - biased.k.astype(np.float32))
    assert ruined[..., :5].max() > 0.5  # what the offset is for


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_of_zeros_of_tiny_and_of_large_values_stay_so(kv_dtype):
    k, v = values(1)
    k[0, 0], k[0, 1], v[0, 0], v[0, 1, 0, 0] = 0, k[0, 1] * 1e-30, v[0, 0] * 1e30, 1e4
    entry = cb.ChunkEntry(k.astype(BFLOAT16), v.astype(BFLOAT16)).quantised(kv_dtype).dequantised()
    assert (entry.k[0, 0] == 0).all()
    for before, after in ((k[0, 1], entry.k[0, 1]), (v[0, 0], entry.v[0, 0])):
        after = after.astype(np.float32)
        assert np.abs(after - before).max() < np.abs(before).max() / 12
    assert np.isfinite(entry.v.astype(np.float32)).all()
    assert np.abs(entry.v[0, 1, 1].astype(np.float32) - v[0, 1, 1]).max() < 0.3  # the other head's scale is its own


@pytest.mark.parametrize("outlier", [np.nan, np.inf, 65504.0])
def test_an_entry_whose_codes_could_not_say_its_values_is_stored_as_it_is(tmp_path, outlier):
    k, v = (x.astype(np.float16) for x in values(1))
    v[1, 2, 1, 3] = outlier
    with cb.ChunkStore(tmp_path, kv_dtype="int8") as store:
        store.put("a", cb.ChunkEntry(k, v))
        store.put("b", cb.ChunkEntry(k, k))
    with cb.ChunkStore(tmp_path) as store:  # both in one pack
        assert len(packs(tmp_path)) == 1
        assert (store.get("a").kv_dtype, store.get("b").kv_dtype) == (None, "int8")
        assert same(store.get("a"), cb.ChunkEntry(k, v))


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.55), ("float8_e4m3fn", 0.55), (None, 1.01)])
def test_all_tiers_hold_and_count_the_real_bytes(tmp_path, kv_dtype, most):
    k, v = values(1, BFLOAT16)
    entry = cb.ChunkEntry(k, v, "f", (1, 2))
    with cb.ChunkStore(tmp_path, kv_dtype=kv_dtype) as store:
        store.put("a", entry, wait=True)
        store.flush()
        stats, stored = store.stats, store.get("a")
        assert stats.host.bytes == stored.num_bytes <= most * entry.num_bytes
        assert stats.disk.bytes == sum(path.stat().st_size for path in packs(tmp_path)[0].rglob("*") if path.is_file())
        assert stats.disk.bytes - 8192 < stored.num_bytes
    with cb.ChunkStore(tmp_path) as store, store.open("a") as chunk:
        assert (chunk.tier, chunk.num_bytes, chunk.kv_dtype) == ("disk", stored.num_bytes, kv_dtype)
        assert (chunk.dtype, chunk.shape) == (BFLOAT16, k.shape)
        assert same(store.get("a"), entry.quantised(kv_dtype))
    # Twice as many find room.
    with cb.ChunkStore(host_bytes=int(2.2 * entry.num_bytes), kv_dtype=kv_dtype) as store:
        for name in "abcd":
            store.put(name, entry)
        assert len(store) == (2 if kv_dtype is None else 4)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_layers_read_alone_are_those_of_the_whole(tmp_path, kv_dtype):
    bias = np.full((LAYERS, HEADS, DIM), 2, np.float32)
    given = make_entry(1)
    entry = cb.ChunkEntry(given.k, given.v, k_offset=bias)
    with cb.ChunkStore(tmp_path, kv_dtype=kv_dtype) as store:
        store.put("a", entry)
    wanted = entry.quantised(kv_dtype)
    with cb.ChunkStore(tmp_path) as store:
        for _ in range(2):  # from disk, then from memory
            with store.open("a") as chunk:
                k, v = chunk.read_layer(1)
            assert k.dequantised(FLOAT32).tobytes() == wanted.dequantised().k[1].tobytes()
            assert v.dequantised(FLOAT32).tobytes() == wanted.dequantised().v[1].tobytes()
            store.promote("a")


def test_a_damaged_scale_is_found_and_the_entry_never_served(tmp_path):
    fill(tmp_path, [1, 2], tokens=BIG, kv_dtype="int8")
    (pack,) = packs(tmp_path)
    scales = make_entry(1, BIG).quantised("int8").scales.v[1].swapaxes(0, 1).tobytes()
    data = next(path for path in pack.rglob("*") if path.is_file() and scales in path.read_bytes())
    flip(data, data.read_bytes().index(scales) + 100, 6)
    assert report_of(tmp_path)["problems"]
    with cb.ChunkStore(tmp_path) as store:
        with store.open(key_of(1)) as chunk:
            chunk.read_layer(0)
            with pytest.raises(cb.DamagedEntryError, match=r"layer 1 of entry .* has a wrong checksum"):
                chunk.read_layer(1)
        assert store.get(key_of(1)) is None
        assert store.stats.damaged == 1
        assert same(store.get(key_of(2)), make_entry(2, BIG).quantised("int8"))


@pytest.mark.once
def test_flipped_bits_and_killed_writers_of_quantised_entries(tmp_path):
    assert quantised_flips(tmp_path / "flips", range(20))["found_by_lookups"] > 1
    assert kills(tmp_path / "kills", range(6), kv_dtype="float8_e4m3fn")["entries_found"] > 2


def test_entries_of_both_kinds_share_a_directory_and_keys(tmp_path):
    fill(tmp_path, [1], one_by_one=True)
    fill(tmp_path, [2], one_by_one=True, kv_dtype="int8")
    fill(tmp_path, [3], one_by_one=True, kv_dtype="float8_e4m3fn")
    versions = {}
    for pack in packs(tmp_path):
        contents = json.loads((pack / "entries.json").read_text())["pack"]
        (record,) = contents["entries"]
        versions[record["key"]] = contents["version"], record["version"], record.get("kv_dtype")
        assert record["dtype"] == "float32"
    wanted = {1: (3, 3, None), 2: (3, 3, "int8"), 3: (3, 3, "float8_e4m3fn")}
    assert versions == {key_of(seed): kind for seed, kind in wanted.items()}
    assert report_of(tmp_path)["problems"] == []
    (tmp_path / "index.sqlite").unlink()  # the records of the packs say it, too
    with cb.ChunkStore(tmp_path, kv_dtype="int8") as store:
        for seed, (_, _, kv_dtype) in wanted.items():
            assert same(store.get(key_of(seed)), make_entry(seed).quantised(kv_dtype))
        store.put(key_of(1), make_entry(1))  # the same key, whatever the kind
        store.flush()
    with cb.ChunkStore(tmp_path) as store:
        assert len(store) == 3
        assert store.get(key_of(1)).kv_dtype == "int8"


def test_code_that_knows_no_quantised_entries_takes_them_for_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.head_groups.MOST_GROUPS", 1)
    fill(tmp_path, [1], one_by_one=True)
    fill(tmp_path, [2], one_by_one=True, kv_dtype="int8")
    monkeypatch.setattr("cacheblend_jax.store.record.READABLE_VERSIONS", (1,))
    with cb.ChunkStore(tmp_path) as store:
        assert store.get(key_of(1)) is not None
        assert store.get(key_of(2)) is None
        assert (store.stats.outdated, store.stats.damaged) == (1, 0)


def test_orbax_alone_reads_the_codes_and_what_dequantises_them(tmp_path):
    k, v = values(1)
    with cb.ChunkStore(tmp_path, kv_dtype="int8") as store:
        store.put("a", cb.ChunkEntry(k, v))
    tree = ocp.load(epath.Path(packs(tmp_path)[0]))
    restored = tree["k"].astype(np.float32) * np.asarray(tree["k_scales"]).astype(np.float32)[..., None]
    assert np.abs(restored - k).max() < 0.03
    assert np.asarray(tree["v_scales"]).dtype == SCALES


def test_an_unknown_dtype_lists_the_known():
    with pytest.raises(cb.CacheBlendError, match="unknown kv_dtype 'int4'; expected 'int8', 'float8_e4m3fn', or None"):
        cb.ChunkStore(kv_dtype="int4")


def test_what_is_quantised_is_not_quantised_again():
    entry = make_entry(1).quantised("int8")
    assert entry.quantised("float8_e4m3fn") is entry
    assert make_entry(1).quantised(None).kv_dtype is None
    with pytest.raises(ValueError, match=r"k_offset must be .* float32\[3, 2, 8\], got float64\[3\]"):
        cb.ChunkEntry(entry.dequantised().k, entry.dequantised().v, k_offset=np.zeros(3))
