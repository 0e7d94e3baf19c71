"""The memory store: bounded, least recently used out first, and keys that mix nothing up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.store import ChunkEntry, TierStats, chunk_key
from cacheblend_jax.store.checks import check_capacity
from cacheblend_jax.store.keys import is_of_tenant

ENTRY_BYTES = 2 * 2 * 3 * 1 * 4 * 4


def entry(fill: float = 0.0, tokens: int = 3) -> ChunkEntry:
    return ChunkEntry(*(np.full((2, tokens, 1, 4), fill, np.float32) for _ in range(2)))


def test_the_least_recently_used_goes_first():
    store = cb.ChunkStore(host_bytes=2 * ENTRY_BYTES)
    assert store.put("a", entry())
    assert store.put("b", entry())
    assert store.get("a") is not None
    assert store.put("c", entry())
    assert store.keys() == ["c", "a"]  # what was seen twice goes last
    assert store.get("b") is None
    assert (store.stats.hits, store.stats.misses) == (1, 1)
    assert store.stats.host == TierStats(hits=1, entries=2, bytes=2 * ENTRY_BYTES, evicted=1)


def test_what_is_renewed_goes_after_what_was_stored_before_and_has_not_been_used():
    store = cb.ChunkStore(host_bytes=4 * ENTRY_BYTES)
    for key in "abcd":
        store.put(key, entry(), uses=0)
    for key in "cdcd":
        store.get(key)
    before = store.stats
    store.renew(["missing", "b", "a", "c"])
    assert store.keys() == ["b", "a", "d", "c"]
    assert store.stats == before
    store.get("a")
    assert store.keys() == ["b", "a", "d", "c"]  # used once, whatever it was before
    store.put("e", entry())
    assert store.keys() == ["a", "e", "d", "c"]


def test_what_is_larger_than_the_store_evicts_nothing():
    store = cb.ChunkStore(host_bytes=2 * ENTRY_BYTES)
    store.put("a", entry())
    assert not store.put("huge", entry(tokens=9))
    assert store.keys() == ["a"]
    assert store.stats.host.rejected == 1


def test_what_finds_no_room_among_entries_in_use_evicts_nothing():
    store = cb.ChunkStore(host_bytes=4 * ENTRY_BYTES)
    for name in "abcd":
        store.put(name, entry())
    with store.open("a"), store.open("b"):
        assert not store.put("large", entry(tokens=9))
        assert sorted(store.keys()) == list("abcd")
        assert not store.put("c", entry(tokens=9))  # but the one that it replaces is not served any more
        assert sorted(store.keys()) == list("abd")
    assert not store.put("d", entry(tokens=99))
    assert sorted(store.keys()) == list("ab")
    assert (store.stats.host.evicted, store.stats.host.rejected) == (0, 3)


def test_entries_are_read_only():
    store = cb.ChunkStore()
    store.put("a", entry())
    with pytest.raises(ValueError, match="read-only"):
        store.get("a").k[:] = 1


def views(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """An array that its caller can write, and one that shows the same memory in some way."""
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4)
    if kind == "subclass":
        return base, base.view(type("Own", (np.ndarray,), {}))
    if kind == "read-only view":
        view = base[:]
        view.flags.writeable = False
        return base, view
    if kind == "order":
        base = np.asfortranarray(base)
    if kind == "byte order":
        base = base.astype(">f4")
    return base, {"view": base[:], "broadcast": np.broadcast_to(base[:, :1], base.shape)}.get(kind, base)


KINDS = ["itself", "view", "read-only view", "broadcast", "subclass", "order", "byte order"]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_store_returns_what_was_put_whatever_becomes_of_the_callers_arrays(tmp_path, monkeypatch, kind, on_disk):
    monkeypatch.setattr("cacheblend_jax.store.writeback.LINGER_SECONDS", 60)  # not written before the arrays change
    base, array = views(kind)
    other = np.ones(base.shape, base.dtype)
    wanted = array.tobytes() if array.dtype.isnative else array.astype(np.float32).tobytes()
    with cb.ChunkStore(tmp_path if on_disk else None) as store:
        store.put("a", ChunkEntry(array, other))
        base[...] = 5  # the caller's array is not frozen
        other[...] = 5
        assert store.get("a").k.tobytes() == wanted
        assert (store.get("a").v == 1).all()
    if on_disk:
        with cb.ChunkStore(tmp_path) as store:
            assert store.get("a").k.tobytes() == wanted
            assert store.stats.damaged == 0


def test_arrays_that_are_handed_over_are_not_copied():
    given = entry(1.0).hand_over()
    store = cb.ChunkStore()
    store.put("a", given)
    assert store.get("a").k is given.k
    assert store.get("a").v is given.v


def test_what_is_changed_by_force_before_it_is_written_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.writeback.LINGER_SECONDS", 60)
    given = entry(1.0).hand_over()
    with cb.ChunkStore(tmp_path) as store:
        store.put("a", given)
        given.k.flags.writeable = True
        given.k[...] = 5
    with cb.ChunkStore(tmp_path) as store:
        assert store.get("a") is None
        assert store.stats.damaged == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 6), st.booleans()), max_size=40))
def test_the_store_never_holds_more_than_its_bytes(steps):
    store = cb.ChunkStore(host_bytes=4 * ENTRY_BYTES)
    for key, tokens, reads in steps:
        if reads:
            store.get(key)
        else:
            store.put(key, entry(tokens=tokens))
        held = sum(store._memory.host.peek(name).num_bytes for name in list(store.keys()))
        assert store.stats.host.bytes == held <= 4 * ENTRY_BYTES
        assert store.stats.host.entries == len(store)


@pytest.mark.parametrize("size", [0, -1, True])
@pytest.mark.parametrize("name", ["host_bytes", "disk_bytes", "queue_bytes"])
def test_a_capacity_that_makes_no_sense_is_refused(name, size):
    with pytest.raises(cb.CacheBlendError, match=f"{name} must be a whole number of at least 1"):
        cb.ChunkStore(**{name: size})


@pytest.mark.parametrize("size", [1.5, "1", None])  # which the type checks of the suite would refuse first
def test_a_capacity_that_is_no_number_of_bytes_is_refused(size):
    with pytest.raises(cb.CacheBlendError, match="host_bytes must be a whole number of at least 1"):
        check_capacity("host_bytes", size, least=1)


def test_an_entry_of_two_shapes_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        ChunkEntry(entry().k, entry(tokens=4).v)


ids = st.lists(st.integers(0, 1000), max_size=4)
fields = st.tuples(st.text(max_size=3), ids, ids, st.text(max_size=3), st.text(max_size=3))


@given(fields, fields)
def test_keys_are_equal_only_for_equal_fields(one, other):
    def key(fields):
        fingerprint, context, chunk, salt, tenant = fields
        return chunk_key(fingerprint, np.asarray(context, np.int64), np.asarray(chunk, np.int32), salt, tenant)

    assert (key(one) == key(other)) == (one == other)


def test_a_salt_separates_tenants():
    prompt = cb.Prompt([1, 2], [[3, 4, 5]], [6])
    model = cb.model.random_model(_tiny())
    mine, theirs = cb.ChunkStore(salt="mine"), cb.ChunkStore(salt="theirs")
    assert not set(cb.Engine(model, mine).precompute(prompt)) & set(cb.Engine(model, theirs).precompute(prompt))


@given(st.text(max_size=3), st.text(max_size=3))
def test_a_key_says_whose_the_entry_is(one, other):
    key = chunk_key("model", np.arange(2), np.arange(3), "salt", one)
    assert is_of_tenant(key, other) == (one == other)


def _tiny():
    from conftest import FAMILIES

    return FAMILIES["llama3"]


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_an_entry_of_a_dtype_that_no_model_has_is_refused(dtype):
    with pytest.raises(cb.CacheBlendError, match=f"must be float32, bfloat16 or float16, got {np.dtype(dtype)}"):
        cb.ChunkStore().put("a", ChunkEntry(*(np.zeros((2, 3, 1, 4), dtype) for _ in range(2))))
