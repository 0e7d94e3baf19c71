"""A CPU prefills two prompts at a time: each as alone, and no third beside them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import HF, TWO_STAGES, family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.engine import groups, pauses
from cacheblend_jax.engine.groups import num_lanes
from cacheblend_jax.engine.scheduled import free_slot
from cacheblend_jax.engine.slot_batch import Ending, SlotBatch
from cacheblend_jax.engine.slot_part import SlotPart
from cacheblend_jax.model.sampling import Sampling


def test_two_lanes_where_several_cores_share_one_device(monkeypatch):
    model = family_model("llama2")
    monkeypatch.setattr(groups, "num_cores", lambda: 2)
    assert num_lanes(model) == 2
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    assert num_lanes(cb.load_model(HF / "llama2", mesh=mesh)) == 1
    monkeypatch.setattr(groups, "num_cores", lambda: 1)
    assert num_lanes(model) == 1


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert groups.num_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    for known, wanted in ((None, 1), (3, 3)):
        monkeypatch.setattr(os, "cpu_count", lambda known=known: known)
        assert groups.num_cores() == wanted


@pytest.fixture
def two_lanes(monkeypatch):
    """However many cores there are."""
    monkeypatch.setattr(groups, "num_lanes", lambda model: 2)


@pytest.mark.parametrize("selector", ["hkvd", "oracle"])  # the oracle's full prefill is part of a prefill
def test_i6_two_prompts_are_prefilled_at_the_same_time_as_each_alone(two_lanes, monkeypatch, selector):
    """Both stop at a barrier between two layers, which neither passes before the other is there."""
    engine = cb.Engine(family_model("llama2"), blend=cb.BlendConfig(0.3, selector, num_stages=1))
    prompts = [random_prompt(seed) for seed in (1, 2)]
    for prompt in prompts:
        engine.precompute(prompt)
    alone = [engine.prefill(prompt) for prompt in prompts]
    monkeypatch.setattr(pauses, "LONGEST_S", 0.0)
    both = threading.Barrier(2, timeout=300)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda prompt: engine.prefill(prompt, between=both.wait), prompts))
    for out, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
        np.testing.assert_allclose(out.logits, wanted.logits, atol=1e-4)
    engine.close()


def test_a_third_prompt_waits_for_a_lane(two_lanes, monkeypatch):
    engine, waits = cb.Engine(family_model("llama2"), blend=TWO_STAGES), threading.Event()
    changed = engine._groups._changed
    wait_for = changed.wait_for
    with ThreadPoolExecutor(1) as thread, engine._groups.turn() as one:
        with engine._groups.turn() as other:
            assert one.executors is not other.executors
            monkeypatch.setattr(changed, "wait_for", lambda is_free: (waits.set(), wait_for(is_free)))
            third = thread.submit(engine.prefill, cb.Prompt("", (), [1, 2, 3]), "full")
            assert waits.wait(300)
            assert not third.done()
        assert third.result(timeout=300).stats.wait_s > 0  # in the lane that is free, whichever it is


def test_slots_are_decoded_in_two_parts_at_the_same_time_as_each_answer_alone(two_lanes, monkeypatch):
    """Both parts' first steps meet at a barrier; later the answers that are left are in one part, then in the other."""
    engine, met = cb.Engine(family_model("llama2")), threading.Barrier(2, timeout=300)
    prompts = [random_prompt(seed) for seed in (1, 2, 3)]
    lengths = (4, 12, 8)  # of slots 0 and 2, which are one part, and of slot 1
    alone = [
        engine.generate(prompt, "full", max_new_tokens=most, stop_token_ids=()).token_ids
        for prompt, most in zip(prompts, lengths, strict=True)
    ]
    batch = SlotBatch(engine.model, engine.buckets, 3, 256, num_parts=2)
    assert [batch.part_of(slot) for slot in range(3)] == [0, 1, 0]
    batch.warm_up()
    answers, endings = [], [Ending(frozenset(), most) for most in lengths]
    for slot, (prompt, ending) in enumerate(zip(prompts, endings, strict=True)):
        out = engine.prefill(prompt, "full")
        answers.append([out.next_token])
        batch.insert(slot, out, out.next_token, ending, Sampling())
    decode = SlotPart.decode

    def meeting(part, *arguments, **options):
        if not met.broken and len(running) == 3:
            met.wait()
        return decode(part, *arguments, **options)

    monkeypatch.setattr(SlotPart, "decode", meeting)
    batch.preparation(256, with_logprobs=True)()
    count = engine.model.runner.count
    while running := {slot for slot, answer in enumerate(answers) if len(answer) < lengths[slot]}:
        for slot, block in enumerate(batch.decode(running, 3, with_logprobs=True)):
            answers[slot] += block.token_ids
            assert [each.likeliest[0][0] for each in block.logprobs] == block.token_ids
    assert answers == alone
    assert engine.model.runner.count == count
    batch.close()
    engine.close()


def test_a_part_that_fails_loses_its_own_slots_alone(two_lanes, monkeypatch):
    engine = cb.Engine(family_model("llama2"))
    out, batch = engine.prefill(random_prompt(1), "full"), SlotBatch(engine.model, engine.buckets, 2, 256, num_parts=2)
    alone = engine.generate(random_prompt(1), "full", max_new_tokens=6, stop_token_ids=()).token_ids
    for slot in (0, 1):
        batch.insert(slot, out, out.next_token, Ending(frozenset(), 6), Sampling())
    failing, decode, other_is_done = batch._parts[0], SlotPart.decode, threading.Event()

    def decode_or_fail(part, *arguments, **options):
        if part is failing:
            raise MemoryError("of one part")
        block = decode(part, *arguments, **options)
        other_is_done.set()
        return block

    monkeypatch.setattr(SlotPart, "decode", decode_or_fail)
    with pytest.raises(MemoryError):
        batch.decode({0, 1}, 1)
    assert other_is_done.is_set()  # nobody uses the slots once an error is known
    monkeypatch.setattr(SlotPart, "decode", decode)
    assert batch.decode({1}, 8)[1].token_ids == alone[2:]
    batch.close()
    engine.close()


def test_a_request_goes_to_the_part_with_fewer_answers():
    at = {"group_of": lambda slot: None, "part_of": lambda slot: slot % 2, "lanes": 2}
    assert free_slot(6, **at, running={0, 2}, prefilling=()) == 1
    assert free_slot(6, **at, running={0}, prefilling={1}) == 2
    assert free_slot(6, **at, running={1, 3}, prefilling={5}) == 0
    assert free_slot(6, **at, running=(), prefilling={0, 1}) is None


def test_batches_are_answered_in_two_lanes_as_each_prompt_alone(two_lanes, tmp_path):
    engine = cb.Engine(family_model("llama2"), cb.ChunkStore(tmp_path, host_bytes=1), TWO_STAGES)
    prompts = [random_prompt(seed) for seed in (1, 2, 1, 2)]
    for prompt in prompts:
        engine.precompute(prompt)
    engine.flush()
    alone = [engine.generate(prompt, max_new_tokens=5, stop_token_ids=()).token_ids for prompt in prompts]
    together = engine.generate_batch(prompts, max_new_tokens=5, stop_token_ids=())
    assert [answer.token_ids for answer in together] == alone
    prefilled = engine.prefill_batch(prompts)
    assert [out.next_token for out in prefilled] == [tokens[0] for tokens in alone]
    engine.close()
