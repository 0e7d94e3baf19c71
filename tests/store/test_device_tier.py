"""The device tier: bounded, least recently used out first, and the same bits as from the host, without a transfer."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import FAMILIES, HF, TWO_STAGES, family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.store import DeviceEntry

PADDED = 32  # rows of an entry of up to 32 tokens


def make_entry(seed: int, tokens: int = 5) -> cb.ChunkEntry:
    rng = np.random.default_rng(seed)
    return cb.ChunkEntry(*(rng.standard_normal((2, tokens, 1, 4)).astype(np.float32) for _ in range(2)), "f", (1, 2))


def to_device(entry: cb.ChunkEntry) -> DeviceEntry:
    padding = ((0, 0), (0, PADDED - entry.num_tokens), (0, 0), (0, 0))
    k, v = (jax.device_put(np.pad(array, padding)) for array in (entry.k, entry.v))
    return DeviceEntry(k, v, entry.num_tokens, entry.fingerprint, entry.context_ids)


SIZE = to_device(make_entry(0)).num_bytes


def on_device(store: cb.ChunkStore, key: str) -> bool:
    with store.open(key) as chunk:
        return chunk.tier == "device"


def same(one: cb.ChunkEntry, other: cb.ChunkEntry) -> bool:
    return one.k.tobytes() == other.k.tobytes() and one.v.tobytes() == other.v.tobytes()


@pytest.mark.parametrize("size", [-1, True])
def test_a_capacity_that_makes_no_sense_is_refused(size):
    with pytest.raises(cb.CacheBlendError, match="device_bytes must be a whole number of at least 0"):
        cb.ChunkStore(device_bytes=size)


def test_a_promoted_entry_is_read_from_the_device_bit_for_bit():
    store = cb.ChunkStore(device_bytes=SIZE)
    wanted = make_entry(1)
    store.put("a", wanted)
    assert not on_device(store, "a")
    store.promote("a", to_device)
    with store.open("a") as chunk:
        assert (chunk.tier, chunk.num_tokens, chunk.num_layers, chunk.num_bytes) == ("device", 5, 2, wanted.num_bytes)
        layers = [chunk.read_layer(layer) for layer in range(2)]
    assert same(cb.ChunkEntry(*(np.stack(arrays) for arrays in zip(*layers, strict=True))), wanted)
    stats = store.stats
    assert (stats.hits, stats.device.hits, stats.device.entries, stats.device.bytes) == (2, 1, 1, SIZE)
    assert store.keys() == ["a"]
    assert len(store) == 1


def test_without_capacity_nothing_goes_to_the_device():
    store = cb.ChunkStore()
    store.put("a", make_entry(1))
    store.promote("a", to_device)
    assert not on_device(store, "a")
    assert store.stats.device.bytes == 0


def test_the_least_used_goes_first_and_one_in_use_never():
    store = cb.ChunkStore(device_bytes=2 * SIZE)
    for name in "abc":
        store.put(name, make_entry(ord(name)), uses=0)

    def kept_after(name: str, uses: int) -> set[str]:
        for _ in range(uses):
            store.get(name)
        store.promote(name, to_device)
        return {name for name in "abc" if store._memory.device.peek(name) is not None}

    assert kept_after("a", 0) == {"a"}
    assert kept_after("b", 0) == {"a", "b"}
    assert kept_after("c", 1) == {"a", "b"}  # not used more than they by enough
    with store.open("a"):
        assert kept_after("c", 1) == {"a", "c"}
        assert kept_after("b", 4) == {"a", "b"}  # `c` went for it: `a` is in use
    assert store.stats.device.evicted == 2
    assert store.stats.device.bytes <= 2 * SIZE
    assert kept_after("c", 1) == {"b", "c"}


def test_a_flood_leaves_what_was_seen_twice_on_the_device():
    store = cb.ChunkStore(device_bytes=5 * SIZE)
    for seed in range(3):
        store.put(f"hot {seed}", make_entry(seed))
        store.get(f"hot {seed}")
        store.promote(f"hot {seed}", to_device)
    for seed in range(50):
        store.put(f"flood {seed}", make_entry(seed), uses=0)
        store.promote(f"flood {seed}", to_device)
    assert all(on_device(store, f"hot {seed}") for seed in range(3))


def test_what_only_the_device_still_has_comes_back_to_the_host():
    wanted = make_entry(1)
    store = cb.ChunkStore(host_bytes=wanted.num_bytes, device_bytes=SIZE)
    store.put("a", wanted)
    store.promote("a", to_device)
    store.put("b", make_entry(2))
    assert "a" in store
    assert sorted(store.keys()) == ["a", "b"]
    loaded = store.get("a")
    assert same(loaded, wanted)
    assert not loaded.k.flags.writeable
    assert (loaded.fingerprint, loaded.context_ids) == ("f", (1, 2))
    assert store.stats.device.hits == 1


@pytest.mark.parametrize("how", ["put", "remove", "clear"])
def test_what_is_replaced_or_removed_is_not_on_the_device_any_more(how):
    store = cb.ChunkStore(device_bytes=4 * SIZE)
    act = {"put": lambda: store.put("a", make_entry(2)), "remove": lambda: store.remove("a"), "clear": store.clear}[how]

    def slow(entry: cb.ChunkEntry) -> DeviceEntry:
        act()  # while it is on its way
        return to_device(entry)

    for copy in (to_device, slow):
        store.put("a", make_entry(1))
        store.promote("a", copy)
        if copy is to_device:
            assert on_device(store, "a")
            act()
        assert store.stats.device.bytes == 0
        assert ("a" in store) == (how == "put")
        if how == "put":
            assert same(store.get("a"), make_entry(2))


def test_what_nobody_uses_gives_the_device_its_memory_back():
    store = cb.ChunkStore(device_bytes=4 * SIZE)
    for name in "ab":
        store.put(name, make_entry(1))
        store.promote(name, to_device)
    throttled = cb.store.ThrottledStore(store, 1e12)
    with store.open("a"):
        assert throttled.drop_device()
        assert [on_device(store, name) for name in "ab"] == [True, False]
        assert not store.drop_device()
    assert store.drop_device()
    assert store.stats.device.bytes == 0
    assert same(store.get("a"), make_entry(1))  # from host memory


def test_a_prefill_without_memory_begins_anew_without_the_tier(monkeypatch, caplog):
    model, prompt, other = family_model("llama3"), random_prompt(13), random_prompt(14)
    with cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine:
        for each in (prompt, other):
            engine.precompute(each)
            engine.prefill(each)
            engine.flush()
        wanted, entries = engine.prefill(prompt), engine.store.stats.device.entries
        run, failures = (
            engine._groups.first._run_on_device,
            [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")],
        )

        def fail_once(*args):
            if failures:
                raise failures.pop()
            return run(*args)

        monkeypatch.setattr(engine._groups.first, "_run_on_device", fail_once)
        out = engine.prefill(prompt)
        assert out.logits.tobytes() == wanted.logits.tobytes()
        assert 0 < engine.store.stats.device.entries < entries  # but those that it uses
        assert caplog.text.count("ran out of memory") == 1
        failures.append(jax.errors.JaxRuntimeError("INTERNAL: something else"))
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            engine.prefill(prompt)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("mode", ["blend", "reuse", "prefix"])
def test_answers_are_the_same_bits_with_and_without(family, mode):
    model, prompt = family_model(family), random_prompt(11)
    with (
        cb.Engine(model, cb.ChunkStore(), TWO_STAGES) as plain,
        cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine,
    ):
        plain.precompute(prompt)
        engine.precompute(prompt)
        wanted = plain.prefill(prompt, mode)
        for turn in range(3):
            out = engine.prefill(prompt, mode)
            assert out.stats.executor == "resident"
            assert out.logits.tobytes() == wanted.logits.tobytes()
            assert np.asarray(out.cache.k).tobytes() == np.asarray(wanted.cache.k).tobytes()
            assert np.asarray(out.cache.v).tobytes() == np.asarray(wanted.cache.v).tobytes()
            engine.flush()
            assert (engine.store.stats.device.hits > 0) == (turn > 0)


def test_some_on_the_device_and_some_not_is_the_same_answer():
    model, prompt = family_model("llama3"), random_prompt(12)
    with (
        cb.Engine(model, cb.ChunkStore(), TWO_STAGES) as plain,
        cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine,
    ):
        wanted = plain.prefill(prompt, "full")
        plain.precompute(prompt)
        wanted = plain.prefill(prompt)
        keys = engine.precompute(prompt)
        for key in keys[1:3]:
            engine.store.promote(key, engine._groups.first.to_device)
        out = engine.prefill(prompt)
        assert engine.store.stats.device.hits == 2
        assert out.logits.tobytes() == wanted.logits.tobytes()


def test_a_hit_on_the_device_transfers_no_kv(monkeypatch):
    model, prompt = family_model("llama3"), random_prompt(13)
    with cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine:
        engine.precompute(prompt)
        engine.prefill(prompt)
        engine.flush()
        put, sizes = jax.device_put, []

        def note(tree, *args, **options):
            sizes.extend(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, np.ndarray))
            return put(tree, *args, **options)

        monkeypatch.setattr(jax, "device_put", note)
        engine.prefill(prompt)
        config = FAMILIES["llama3"]
        layer = config.num_kv_heads * config.head_dim * 4 * 20  # of K: less than any chunk but the shortest takes
        assert engine.store.stats.device.hits == 5
        assert all(size < config.num_layers * layer for size in sizes), sizes


def test_nothing_compiles_after_warm_up():
    model = cb.model.random_model(FAMILIES["llama3"], seed=7)  # of its own: its programs are no other test's
    with cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine:
        engine.warmup(128, prefix_tokens=9, suffix_tokens=7)
        for prompt in (random_prompt(6), random_prompt(7, (20, 50, 30))):
            engine.precompute(prompt)
            for _ in range(2):
                assert engine.prefill(prompt).stats.compile_s == 0
                engine.flush()
        assert engine.store.stats.device.hits > 0


def test_on_a_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    model = cb.load_model(HF / "qwen3", dtype="float32", mesh=mesh)
    prompt = random_prompt(14)
    with cb.Engine(model, cb.ChunkStore(device_bytes=2**30), TWO_STAGES) as engine:
        engine.precompute(prompt)
        wanted = engine.prefill(prompt).logits
        engine.flush()
        assert engine.prefill(prompt).logits.tobytes() == wanted.tobytes()
        assert engine.store.stats.device.hits == 5


def test_a_streaming_engine_reads_what_another_put_on_the_device():
    model, prompt, store = family_model("llama3"), random_prompt(15), cb.ChunkStore(device_bytes=2**30)
    with (
        cb.Engine(model, store, TWO_STAGES) as engine,
        cb.Engine(model, store, TWO_STAGES, executor="streamed") as streamed,
    ):
        engine.precompute(prompt)
        before = streamed.prefill(prompt)
        streamed.flush()
        assert store.stats.device.entries == 0  # it would not use them
        engine.prefill(prompt)
        engine.flush()
        out = streamed.prefill(prompt)
        assert store.stats.device.hits == 5
        assert out.logits.tobytes() == before.logits.tobytes()
