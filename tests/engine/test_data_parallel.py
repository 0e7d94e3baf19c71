"""Data parallelism: groups of a mesh's devices prefill different prompts at the same time, and no KV moves between."""

from __future__ import annotations

import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from mesh_cases import BLEND, PROMPT, collectives, mesh_of, model_on, store_of, whole_model

import cacheblend_jax as cb
from cacheblend_jax.engine import engine as engine_module
from cacheblend_jax.engine import warmup
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.profile import _factors, quick_profile
from cacheblend_jax.engine.slot_batch import Ending, SlotBatch
from cacheblend_jax.model.model import split_model
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.runtime.link import DeviceLink
from cacheblend_jax.runtime.programs import Runner

# All of one plan, whose programs each group compiles once.
PROMPTS = [replace(PROMPT, chunks=PROMPT.chunks[:: 1 - 2 * (i % 2)], suffix=PROMPT.suffix + i) for i in range(4)]
BUCKETS = 64, 80
CASES = [
    ("8 KV heads", "4x2", "resident"),
    ("2 KV heads", "2x4", "streamed"),
    ("experts", "2x4", "resident"),
]


@pytest.fixture
def meeting(monkeypatch):
    """Has prefills wait for as many others as there are groups: one after another, none would begin."""

    def meet(groups: int) -> list[frozenset]:
        run, barrier, devices = Executors.run, threading.Barrier(groups), []

        def run_together(executors, *arguments):
            barrier.wait(300)  # the other group may be compiling
            devices.append(executors._model.placement.device_set)
            return run(executors, *arguments)

        monkeypatch.setattr(Executors, "run", run_together)
        return devices

    return meet


@pytest.mark.parametrize(("name", "shape", "executor"), CASES)
def test_i6_groups_prefill_a_batch_together_as_one_device_does_in_turn(name, shape, executor, meeting):
    with cb.Engine(whole_model(name), store_of(name), BLEND, length_buckets=BUCKETS) as engine:
        one = engine.prefill_batch(PROMPTS)
    model, groups = model_on(name, shape), int(shape[0])
    ran = meeting(groups)
    with cb.Engine(model, store_of(name), BLEND, executor=executor, length_buckets=BUCKETS) as engine:
        outs = engine.prefill_batch(PROMPTS)
    for out, wanted in zip(outs, one, strict=True):
        assert (out.stats.executor, out.stats.hits) == (executor, wanted.stats.hits)
        assert relative_error(out.logits, wanted.logits) < 1e-5
        np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
        assert relative_error(out.cache.k, wanted.cache.k) < 1e-5
    of_groups = [group.placement.device_set for group in model.groups]
    assert sorted(map(of_groups.index, ran)) == sorted([*range(groups)] * (len(PROMPTS) // groups))
    assert len(frozenset().union(*of_groups)) == sum(map(len, of_groups)) == 8


def test_a_scheduler_prefills_for_the_groups_slots_and_compiles_nothing_once_warm(meeting):
    name, model = "experts", model_on("experts", "2x4")
    with cb.Engine(whole_model(name), store_of(name), BLEND, length_buckets=BUCKETS) as engine:
        wanted = [engine.generate(each, max_new_tokens=4, stop_token_ids=[]).token_ids for each in PROMPTS]
    with cb.Engine(model, store_of(name), BLEND, length_buckets=BUCKETS) as engine:
        engine.prepare(PROMPTS[0])
        with cb.Scheduler(engine, slots=2, max_tokens=80) as scheduler:
            scheduler.warmup()
            runners = [each.runner for each in (model, *model.groups)]
            warm = [runner.count for runner in runners]
            ran = meeting(2)
            with scheduler._changed:  # all wait when the first is taken
                answers = [scheduler.submit(each, max_new_tokens=4, stop_token_ids=[]) for each in PROMPTS]
            assert [answer.result().token_ids for answer in answers] == wanted
    assert [ran.count(group.placement.device_set) for group in model.groups] == [2, 2]
    assert [runner.count for runner in runners] == warm


def test_no_kv_moves_between_groups_where_a_prompt_goes_into_a_slot():
    model = model_on("experts", "2x4")
    with cb.Engine(model, store_of("experts"), BLEND, length_buckets=BUCKETS) as engine:
        out, buckets = engine.prefill(PROMPTS[0], group=1), engine.buckets
    assert out.padded_cache.k.sharding.device_set == model.groups[1].placement.device_set
    wanted, length = np.asarray(out.padded_cache.v), out.token_ids.size
    for slots, owners in ((4, [0, 0, 1, 1]), (3, [None] * 3)):
        batch = SlotBatch(model, buckets, slots, 80)
        assert [batch.group_of(slot) for slot in range(slots)] == owners
        (part,) = batch._parts
        before = where(part._state().cache.v)
        with jax.transfer_guard_device_to_device("disallow_explicit" if slots == 4 else "allow"):
            batch.insert(2, out, 5, Ending(frozenset(), 9), Sampling())
        cache = part._slots.cache
        filled, empty = (np.asarray(cache.cut(1, jnp.int32(slot), length).v) for slot in (2, 1))
        np.testing.assert_array_equal(filled, wanted[1, :length])
        assert not empty.any()
        assert np.asarray(part._slots.turn.position).tolist() == [0, 0, length, 0][:slots]
        if slots == 4:
            after, others = where(cache.v), model.groups[0].placement.device_set
            assert {device: after[device] for device in others} == {device: before[device] for device in others}
    runner = model.groups[1].runner
    programs = zip(runner._entries, runner.texts(), strict=True)
    inserting = [collectives(text) for key, text in programs if key[0].__name__ == "insert"]
    assert inserting
    assert not any(inserting)


def test_the_shapes_of_slots_are_looked_up_once(monkeypatch):
    model, called, run = whole_model("2 KV heads"), [], Runner.__call__
    with cb.Engine(model, length_buckets=BUCKETS) as engine:
        out, batch = engine.prefill(PROMPT, "full"), SlotBatch(model, engine.buckets, 2, 80)
        batch.insert(0, out, 5, Ending(frozenset(), 9), Sampling())

        def recorded(runner, function, *arrays, **static):
            called.append(function.__name__)
            return run(runner, function, *arrays, **static)

        monkeypatch.setattr(Runner, "__call__", recorded)
        batch.insert(1, out, 5, Ending(frozenset(), 9), Sampling())
    assert called == ["insert"]


def where(array: jax.Array) -> dict[object, int]:
    return {shard.device: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def test_groups_share_the_meshs_parameters_and_follow_a_change_of_them():
    model = split_model(whole_model("2 KV heads"), mesh_of("2x4"))
    for group in model.groups:
        for own, whole in zip(jax.tree.leaves(group.params), jax.tree.leaves(model.params), strict=True):
            assert where(own).items() <= where(whole).items()
        assert group.fingerprint == model.fingerprint
    before = model.fingerprint
    with cb.Engine(model) as engine:
        out = engine.prefill(PROMPT, "full")
        model.params.embedder["embedding"] = model.params.embedder["embedding"] * 0  # the logits' weights, too
        assert not engine.extend(out, [7]).logits.any()
        assert not engine.prefill(PROMPT, "full", group=1).logits.any()
        with pytest.raises(cb.CacheBlendError, match=r"group must be None or a whole number in \[0, 2\), got 2"):
            engine.prefill(PROMPT, group=2)
    assert model.groups[1].fingerprint == model.fingerprint != before


@pytest.mark.parametrize("device", [None, 1])
def test_slots_of_a_single_device_are_on_that_device(device):
    """Each group of a mesh with `data` alone is one, and a model may be on another than the first."""
    whole, prompts = whole_model("2 KV heads"), [cb.Prompt("", (), [5, 6, 7 + i]) for i in range(2)]
    if device is None:
        model = model_on("2 KV heads", "2x1")
    else:
        model = replace(whole, params=jax.device_put(whole.params, jax.devices()[device]))
    how = {"max_new_tokens": 3, "stop_token_ids": []}
    with cb.Engine(whole) as one, cb.Engine(model) as engine:
        answers = engine.generate_batch(prompts, "full", **how)
        assert [answer.token_ids for answer in answers] == [
            one.generate(each, "full", **how).token_ids for each in prompts
        ]


def test_what_follows_a_prefill_runs_where_its_kv_is():
    name, options = "2 KV heads", {"executor": "streamed", "length_buckets": BUCKETS}
    with cb.Engine(model_on(name, "2x4"), store_of(name), BLEND, **options) as engine:
        outs = [engine.prefill(PROMPT, group=group) for group in range(2)]
        for follow in (
            lambda out: engine.extend(out, [7]).logits,
            lambda out: engine.continuation_logits(out, [7, 8]),
            lambda out: engine.complete(out, max_new_tokens=3, stop_token_ids=[]).token_ids,
        ):
            np.testing.assert_array_equal(*map(follow, outs))


def test_groups_precompute_different_chunks_at_the_same_time(monkeypatch):
    store, barrier, counted = store_of("2 KV heads"), threading.Barrier(2), []
    entry = store.get(store.keys()[0])
    monkeypatch.setattr(Executors, "standalone", lambda *_: (barrier.wait(300), entry)[1])
    with cb.Engine(model_on("2 KV heads", "2x4")) as engine:
        chunks = [PROMPT.chunks[0], PROMPT.chunks[1], PROMPT.chunks[0]]
        keys = engine.precompute(chunks, progress=lambda *count: counted.append(count))
    assert len(keys) == 3
    assert counted == [(1, 3), (2, 3), (3, 3)]


def test_a_quick_estimate_is_of_one_groups_devices_each_with_its_share(monkeypatch):
    group = model_on("8 KV heads", "2x4").groups[0]
    put, where = DeviceLink.put, []
    monkeypatch.setattr(DeviceLink, "put", lambda link, tree, at: where.append(at) or put(link, tree, at))
    quick_profile(model_on("8 KV heads", "2x4"), None)
    assert set(where) == {group.layer_placement}
    assert group.layer_placement.shard_shape((16, 8)) == (16, 2)
    rows, weights = _factors(group)
    assert [x.sharding.shard_shape(x.shape) for x in (rows, weights)] == [(1024, 1024), (1024, 256)]


def test_each_group_is_warmed_up(monkeypatch):
    counted = []
    for module in (engine_module, warmup):
        monkeypatch.setattr(module, "run_tasks", lambda tasks, progress: counted.append(len(tasks)))
    for model in (whole_model("2 KV heads"), model_on("2 KV heads", "2x4"), model_on("2 KV heads", "4x2")):
        with cb.Engine(model) as engine:
            engine.warmup(64, chunk_tokens=32, max_new_tokens=8)
            engine.prepare(PROMPT, max_new_tokens=8)
    assert counted[2:] == [2 * counted[0], 2 * counted[1], 4 * counted[0], 4 * counted[1]]
