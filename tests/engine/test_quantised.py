"""Prefills from quantised KV: equal to those from its values, by either executor, whatever the tier and the mixture."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine.device_layers import placement_name
from cacheblend_jax.model.kv_cache import layer_bytes
from cacheblend_jax.runtime.link import DeviceLink
from cacheblend_jax.runtime.programs import compiler_options
from pallas_kernels.target import Target

PROMPT = random_prompt(3)
QUERY = replace(TWO_STAGES, selector="query")
INT8 = "int8"


class CountingLink(DeviceLink):
    """A device's link that counts what is sent, and streams from host memory as on a GPU."""

    def __init__(self, placement) -> None:
        super().__init__(placement)
        self.is_hidden, self.sent = True, 0

    def page_lock(self, buffer):
        return None

    def put(self, tree, placement):
        self.sent += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        return super().put(jax.tree.map(np.copy, tree), placement)


def engine_over(
    store: cb.ChunkStore, family: str = "qwen2", blend: cb.BlendConfig = TWO_STAGES, **options
) -> cb.Engine:
    return cb.Engine(family_model(family), store, blend=blend, **options)


def filled(kv_dtype: str | None, family: str = "qwen2", prompt: cb.Prompt = PROMPT, **options) -> cb.ChunkStore:
    """A store that has all chunks of the prompt, its prefix included."""
    store = cb.ChunkStore(kv_dtype=kv_dtype, **options)
    with engine_over(store, family) as engine:
        engine.precompute(prompt)
    return store


def entries_of(store: cb.ChunkStore) -> dict[str, cb.ChunkEntry]:
    names = store.keys()
    return {name: store.get(name) for name in names}


def as_values(store: cb.ChunkStore, keys=None) -> cb.ChunkStore:
    """A store that has the values of the entries' codes; only of those of `keys`, and the others as they are."""
    plain = cb.ChunkStore()
    for key, entry in entries_of(store).items():
        plain.put(key, entry.dequantised() if keys is None or key in keys else entry)
    return plain


def assert_equal(actual: cb.PrefillResult, wanted: cb.PrefillResult) -> None:
    np.testing.assert_array_equal(actual.recomputed, wanted.recomputed)
    assert relative_error(actual.logits, wanted.logits) < 1e-5
    assert relative_error(actual.cache.k, wanted.cache.k) < 1e-5
    assert relative_error(actual.cache.v, wanted.cache.v) < 1e-5


@pytest.mark.parametrize(
    ("family", "executor", "blend"),
    [
        ("qwen2", "resident", QUERY),  # with biases of keys
        ("qwen2", "streamed", QUERY),
        ("gemma3", "streamed", TWO_STAGES),
    ],
)
def test_a_blend_of_codes_equals_one_of_their_values(family, executor, blend):
    store = filled(INT8, family)
    assert {entry.kv_dtype for entry in entries_of(store).values()} == {INT8}
    out = engine_over(store, family, blend, executor=executor).prefill(PROMPT)
    assert (out.stats.misses, out.stats.damaged, out.stats.executor) == (0, 0, executor)
    assert_equal(out, engine_over(as_values(store), family, blend).prefill(PROMPT))
    unquantised = engine_over(filled(None, family), family, blend).prefill(PROMPT)
    assert 1e-6 < relative_error(out.logits, unquantised.logits) < 0.05


def test_reuse_returns_the_stored_values_dequantised_bit_for_bit():
    store = filled("float8_e4m3fn")
    with engine_over(store) as engine:
        keys, out = engine.precompute(PROMPT), engine.prefill(PROMPT, "reuse")
    start = len(PROMPT.prefix)
    for key, ids in zip(keys, PROMPT.chunks, strict=True):
        v = store.get(key).dequantised().v
        assert np.asarray(out.cache.v)[:, start : start + len(ids)].tobytes() == v.tobytes()
        start += len(ids)


def test_a_mixture_is_served_by_the_programs_of_values():
    store = filled(INT8)
    with engine_over(store) as engine:
        (first, *_) = keys = engine.precompute(PROMPT)
        plain = engine_over(as_values(store))
        wanted = plain.prefill(PROMPT)
        compiled = plain.model.runner.count
        mixed = as_values(store, keys={first})
        assert {mixed.get(key).kv_dtype for key in keys} == {None, INT8}
        assert_equal(engine_over(mixed).prefill(PROMPT), wanted)
        assert engine.model.runner.count == compiled


def test_codes_of_keys_whose_bias_was_not_subtracted_are_served_as_values():
    moved = cb.ChunkStore(kv_dtype=INT8)
    for key, entry in entries_of(filled(None)).items():
        moved.put(key, cb.ChunkEntry(entry.k, entry.v))  # as they are read from disk
    assert {entry.kv_dtype for entry in entries_of(moved).values()} == {INT8}
    assert_equal(engine_over(moved).prefill(PROMPT), engine_over(as_values(moved)).prefill(PROMPT))


def test_codes_stay_codes_on_the_device():
    store = filled(INT8, device_bytes=2**24)
    with engine_over(store, executor="resident") as engine:
        before = engine.prefill(PROMPT)
        engine.flush()
        stats = store.stats.device
        assert stats.entries == len(store)
        assert 0 < stats.bytes < sum(entry.dequantised().num_bytes for entry in entries_of(store).values())
        after = engine.prefill(PROMPT)
        assert store.stats.device.hits == len(store)
        assert_equal(after, before)
        # One of them as values: the codes of the others become values on their way, by the host.
        store.kv_dtype, key = None, store.keys()[0]
        store.put(key, store.get(key).dequantised())
        assert_equal(engine.prefill(PROMPT), before)


def test_what_is_sent_to_the_device_has_the_size_of_the_codes():
    model, sent = family_model("qwen2"), {}
    for kv_dtype in (None, INT8):
        link = CountingLink(model.placement)
        with engine_over(filled(kv_dtype), executor="streamed", link=link, kept_bytes=0) as engine:
            out = engine.prefill(PROMPT)
            sent[kv_dtype] = link.sent
        length = out.plan.cache_length
        assert link.sent == model.config.num_layers * layer_bytes(model.config, length, kv_dtype)
    assert sent[INT8] < 0.4 * sent[None]  # of float32, at head_dim 8


def test_layers_that_stay_on_the_device_are_of_one_kind():
    chunks = []
    assert placement_name(chunks, 8, INT8) != placement_name(chunks, 8, None)
    model = family_model("qwen2")
    link = CountingLink(model.placement)
    with engine_over(filled(INT8), executor="streamed", link=link, kept_bytes=2**24) as engine:
        first = engine.prefill(PROMPT)
        sent = link.sent
        assert_equal(engine.prefill(PROMPT), first)
        assert link.sent == sent


@pytest.mark.usefixtures("as_users_run_it")
def test_no_program_makes_a_copy_of_all_layers_values():
    model, store = family_model("qwen2"), filled(INT8)
    with engine_over(store, executor="resident") as engine:
        out = engine.prefill(PROMPT)
        executors = engine._groups.first
        texts, plan = [], out.plan

        def lowered(function, *arrays, donate=(), **static):
            program = jax.jit(function, static_argnames=tuple(static)).lower(*arrays, **static)
            texts.append(program.compile(compiler_options=compiler_options("cpu")).as_text())
            return jax.eval_shape(lambda *args: function(*args, **static), *arrays)

        executors._run_over_shapes(plan, "resident", INT8, lowered)
    (text,) = texts
    config = model.config
    stack = rf"\[{config.num_layers},{plan.cache_length},{config.num_kv_heads},{config.head_dim}\]"
    assert re.search(rf"s8{stack}\S* parameter", text)
    made = [line for line in text.splitlines() if re.search(rf"= f32{stack}\S* (convert|multiply|add|fusion)\(", line)]
    in_place = [line for line in made if "dynamic-update-slice" in line or "dynamic_update_slice" in line]
    assert made == in_place


def test_a_device_without_float8_stores_int8_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(Target, "has_float8", property(lambda _: False))
    store = cb.ChunkStore(kv_dtype="float8_e4m3fn")
    for _ in range(2):
        with engine_over(cb.store.ThrottledStore(store, 1e12)) as engine:
            (key, *_) = engine.precompute(PROMPT)
    assert caplog.text.count("the device has no float8_e4m3fn: KV is stored as int8 instead") == 1
    assert store.get(key).kv_dtype == INT8
    # What others stored in float8 is dequantised on the host.
    assert engine._groups.first.delivery.kv_dtypes == (INT8,)
    others = filled_elsewhere(monkeypatch, device_bytes=2**24)
    wanted = engine_over(as_values(others)).prefill(PROMPT)
    with engine_over(others, executor="resident") as engine:
        assert_equal(engine.prefill(PROMPT), wanted)
        engine.flush()
        for name in entries_of(others):
            with others.open(name) as chunk:
                assert chunk.device_entry.kv_dtype is None
        assert_equal(engine.prefill(PROMPT), wanted)


def filled_elsewhere(monkeypatch, **options) -> cb.ChunkStore:
    """A store of float8, filled by a device that has it."""
    with monkeypatch.context() as patch:
        patch.setattr(Target, "has_float8", property(lambda _: True))
        return filled("float8_e4m3fn", **options)


@pytest.mark.parametrize(
    ("target", "has_float8"),
    [
        (Target("cpu"), True),
        (Target("gpu", "NVIDIA A100", (8, 0)), False),
        (Target("gpu", "NVIDIA L4", (8, 9)), True),
        (Target("gpu", "NVIDIA H100", (9, 0)), True),
        (Target("gpu", "AMD"), False),
        (Target("tpu", "TPU v5e"), False),
        (Target("tpu", "TPU v6 lite"), True),
    ],
)
def test_which_devices_have_float8(target, has_float8):
    assert target.has_float8 == has_float8
