"""Answers decoded together have the tokens of each alone (I6), whatever shares the slots with them."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, SHAPE, TWO_STAGES, fresh_engine, random_prompt
from test_generation import compilations

import cacheblend_jax as cb
from cacheblend_jax.engine import shared_reads
from cacheblend_jax.engine.shared_reads import SharedReads
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.slots import decode_slots, empty_slots
from cacheblend_jax.model.transformer import abstract_params
from cacheblend_jax.runtime.programs import Runner
from cacheblend_jax.store.disk_chunk import DiskChunk

SAMPLINGS = [None, cb.Sampling(temperature=1.5, seed=3), cb.Sampling(temperature=0.7, top_k=9, top_p=0.8, seed=5)]
CAPACITY = 160


def cases(count: int) -> list[dict]:
    """Requests of all kinds: ragged prompts, ways to draw, budgets, stop tokens."""
    rng = random.Random(5)
    made = []
    for seed in range(count):
        lengths = [rng.randrange(1, 30) for _ in range(rng.randrange(4))]
        stops = rng.sample(range(SHAPE["vocab_size"]), rng.choice([0, 0, 8]))
        how = {"max_new_tokens": rng.choice([1, 2, 9, 20]), "sampling": rng.choice(SAMPLINGS), "stop_token_ids": stops}
        made.append({"prompt": random_prompt(seed, lengths, rng.randrange(9), 1 + rng.randrange(20)), **how})
    return made


def small(dtype: str) -> ModelConfig:
    return ModelConfig(architecture="LlamaForCausalLM", **SHAPE | {"num_layers": 2}, dtype=dtype)


@pytest.fixture(scope="module")
def engine():
    return fresh_engine("gemma3")


@pytest.fixture(scope="module")
def alone(engine) -> list[cb.Generation]:
    return [engine.generate(case["prompt"], "full", **without_prompt(case)) for case in cases(14)]


def without_prompt(case: dict) -> dict:
    return {name: value for name, value in case.items() if name != "prompt"}


def test_answers_in_any_company_are_those_of_each_alone(engine, alone):
    """Submitted in any order, with some cancelled on their way, slots refilled meanwhile."""
    rng, requests = random.Random(7), cases(14)
    order = [*range(14), *range(14)]
    rng.shuffle(order)
    with cb.Scheduler(engine, slots=3, max_tokens=CAPACITY, steps=3) as scheduler:
        answers = [scheduler.submit(mode="full", **requests[number]) for number in order]
        cancelled = set(rng.sample(range(28), 6))
        for at in cancelled:
            if at % 2:
                next(answers[at], None)  # on its way, or at its end
            answers[at].cancel()
        for at, (number, answer) in enumerate(zip(order, answers, strict=True)):
            wanted = alone[number]
            if answer.finish_reason == "cancelled":
                assert at in cancelled
                continue
            got = answer.result()
            assert (got.token_ids, got.stats.finish_reason) == (wanted.token_ids, wanted.stats.finish_reason)
    assert {wanted.stats.finish_reason for wanted in alone} == {"stop", "length"}
    stats = scheduler.stats
    assert (stats.answered + stats.cancelled, stats.failed, stats.running, stats.waiting) == (28, 0, 0, 0)


def test_a_batch_of_prompts_is_answered_as_each_alone(engine, alone):
    requests = [case for case in cases(14) if case["sampling"] is None and not case["stop_token_ids"]]
    wanted = [each for each, case in zip(alone, cases(14), strict=True) if case in requests]
    most = max(case["max_new_tokens"] for case in requests)
    got = engine.generate_batch([case["prompt"] for case in requests], "full", max_new_tokens=most, stop_token_ids=())
    assert len(got) == len(wanted) > 2
    for one, other, case in zip(got, wanted, requests, strict=True):
        assert one.token_ids[: case["max_new_tokens"]] == other.token_ids
    assert engine.generate_batch([]) == []
    with pytest.raises(cb.PromptError, match="the prompt is empty"):
        engine.generate_batch([random_prompt(1), cb.Prompt([], [], [])])


def test_once_warm_nothing_compiles_whatever_the_slots_are_filled_with():
    engine = cb.Engine(cb.model.random_model(FAMILIES["llama3"], seed=9), blend=TWO_STAGES, length_buckets=(32, 64))
    engine.warmup(64, modes=())
    with cb.Scheduler(engine, slots=2, max_tokens=64) as scheduler:
        with compilations() as names:
            scheduler.warmup()
        assert {"jit(decode_slots)", "jit(insert)", "jit(empty_slots)", "jit(next_token)"} <= set(names)
        with compilations() as names:
            for case in cases(6):
                scheduler.submit(mode="full", **case)
            for length in (1, 32, 33, 64):
                scheduler.submit(cb.Prompt(np.arange(length)), mode="full").result()
            with pytest.raises(cb.CacheBlendError, match="before the first request"):
                scheduler.submit(cb.Prompt([1]), mode="full") and scheduler.warmup()
    assert names == []


@pytest.mark.once
def test_nothing_that_a_request_needs_compiles_in_the_schedulers_thread(monkeypatch):
    engine = cb.Engine(cb.model.random_model(small("float32")), length_buckets=(16, 32))
    threads, compile_program = set(), Runner._compile
    monkeypatch.setattr(
        Runner, "_compile", lambda *of: (threads.add(threading.current_thread().name), compile_program(*of))[1]
    )
    with cb.Scheduler(engine, slots=2, max_tokens=32) as scheduler:
        for prompt in (cb.Prompt(np.arange(5)), random_prompt(0, (4, 4), 2, 7)):
            got = scheduler.submit(prompt, max_new_tokens=3, sampling=SAMPLINGS[1], blend=TWO_STAGES).result()
            assert got.stats.prefill.compile_s > 0
        answer = scheduler.submit(prompt, mode="full", max_new_tokens=3, stop_token_ids=(), logprobs=True)
        token_ids = answer.result().token_ids
    assert {name.rpartition("_")[0] for name in threads} == {"cacheblend-prepare", "cacheblend-store"}
    wanted = jax.nn.log_softmax(engine.continuation_logits(engine.prefill(prompt, "full"), token_ids))
    for number, (token, logprobs) in enumerate(zip(token_ids, np.asarray(wanted), strict=True)):
        got = answer.token(number).logprobs
        assert got.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert [each for each, _ in got.likeliest] == np.argsort(-logprobs, kind="stable")[:20].tolist()
        assert [each for _, each in got.likeliest] == pytest.approx(np.sort(logprobs)[::-1][:20], abs=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_slots_is_written_in_place(dtype):
    config = small(dtype)
    angles = rope_tables(config, CAPACITY)
    slots = jax.eval_shape(lambda: empty_slots(angles, config=config, num_slots=5))
    arguments = (slots, jax.ShapeDtypeStruct((5,), bool), jax.ShapeDtypeStruct((), jnp.int32), angles)
    decode = jax.jit(lambda *of: decode_slots(*of, config=config), donate_argnums=1)
    text = decode.lower(abstract_params(config), *arguments).compile().as_text()
    for stack in (slots.cache.k, slots.cache.v):
        shape = ",".join(map(str, stack.shape))
        made = re.findall(rf"= \w+\[{shape}\]\S* (\w[\w-]*)\(", text)
        assert made
        assert not {"convert", "copy", "bitcast-convert", "select", "transpose"} & set(made)


@pytest.mark.once
def test_slots_of_layers_apart_and_of_a_bfloat16_cache_keep_what_is_inserted():
    model = cb.model.random_model(small("bfloat16"), seed=7, by_layer=True)
    engine = cb.Engine(model, length_buckets=(64,))
    outs = [engine.prefill(random_prompt(seed, (), 5, 30 + seed), "full") for seed in range(3)]
    with cb.Scheduler(engine, slots=4, max_tokens=64) as scheduler:
        answers = [scheduler.submit(random_prompt(seed, (), 5, 30 + seed), mode="full") for seed in range(3)]
        lengths = [len(answer.result().token_ids) for answer in answers]
    assert lengths == [64 - out.token_ids.size + 1 for out in outs]  # the slot is full
    alone = [engine.complete(out, max_new_tokens=2, stop_token_ids=()).token_ids for out in outs]
    assert [answer.result().token_ids[:2] for answer in answers] == alone


def test_a_chunk_that_prompts_share_is_read_once(tmp_path, monkeypatch):
    reads: list[int] = []  # counted at the end: several threads read
    read_layer = DiskChunk.read_layer

    def counted(self, layer, heads=None):
        reads.append(self.num_tokens)
        return read_layer(self, layer, heads)

    monkeypatch.setattr(DiskChunk, "read_layer", counted)
    shared, own = random_prompt(1, (21,)).chunks[0], random_prompt(2, (13,)).chunks[0]
    prompts = [cb.Prompt([], [shared], [1, 2]), cb.Prompt([], [own, shared], [3])]
    with cb.ChunkStore(tmp_path, host_bytes=1) as store:
        engine = cb.Engine(cb.model.random_model(small("float32")), store, executor="resident", length_buckets=(64,))
        for each in prompts:
            engine.precompute(each)
        store.flush()
        one_by_one = [engine.prefill(each, "reuse") for each in prompts]
        layers = engine.model.config.num_layers
        assert Counter(reads) == {21: 2 * layers, 13: layers}
        reads.clear()
        for one, other in zip(engine.prefill_batch(prompts, "reuse"), one_by_one, strict=True):
            np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
            assert one.stats.hits == other.stats.hits > 0
        assert Counter(reads) == {21: layers, 13: layers}
        engine.close()


class Chunk:
    """An entry on disk, with one layer."""

    shape, dtype, num_layers, num_tokens, num_bytes = (1, 2, 1, 4), np.dtype(np.float32), 1, 2, 64
    tier, device_entry, host_entry, kv_dtype, has_k_offset = "disk", None, None, None, False

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.closed = error, 0

    def read_layer(self, layer, heads=None):
        if self.error is not None:
            raise self.error
        return np.ones((2, 1, 4), np.float32), np.ones((2, 1, 4), np.float32)

    def close(self):
        self.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Entries:
    """A store whose entries are opened in this order, whatever their keys."""

    def __init__(self, *chunks: Chunk) -> None:
        self.chunks, self.opened = chunks, 0

    def open(self, key):
        self.opened += 1
        return self.chunks[self.opened - 1] if self.opened <= len(self.chunks) else None


def test_an_entry_that_could_not_be_read_is_opened_anew():
    store = Entries(Chunk(cb.DamagedEntryError("flipped")), Chunk())
    with SharedReads(store, {"key": 3}) as reads:
        with reads.open("key") as chunk, pytest.raises(cb.DamagedEntryError):
            chunk.read_layer(0)
        with reads.open("key") as again:
            again.read_layer(0)
        assert (reads.open("key"), again.tier, store.opened) == (again, "host", 2)
        assert reads.open("other") is None
    assert [chunk.closed for chunk in store.chunks] == [1, 1]


def test_prefills_at_the_same_time_read_a_layer_once_and_find_its_tier_as_it_was():
    chunk, begun, goes_on, reads = Chunk(), threading.Event(), threading.Event(), []
    read = chunk.read_layer
    chunk.read_layer = lambda *which: (reads.append(which), begun.set(), goes_on.wait(300), read(*which))[-1]
    with SharedReads(Entries(chunk), {"key": 2}) as shared, ThreadPoolExecutor(2) as groups:
        with shared.open("key") as first, shared.open("key") as second:
            one = groups.submit(first.read_layer, 0)
            begun.wait(300)
            other = groups.submit(second.read_layer, 0)
            goes_on.set()
            assert one.result() is other.result()
            assert (len(reads), first.tier) == (1, "disk")  # which says how a prefill that is running reads it
        assert chunk.closed == 1


def test_an_entry_is_kept_no_longer_than_a_prefill_wants_it(monkeypatch):
    store = Entries(*[Chunk() for _ in range(4)])
    with SharedReads(store, {"shared": 3, "own": 1, "one more": 2}) as reads:
        with reads.open("shared") as first, reads.open("own") as own, reads.open("shared") as again:
            assert first is again
            for chunk in (first, own):
                chunk.read_layer(0)
        assert (first.tier, own.tier) == ("host", "disk")  # what nobody wants again is not kept in memory
        assert [chunk.closed for chunk in store.chunks] == [0, 1, 0, 0]
        with reads.open("shared"):
            pass
        assert [chunk.closed for chunk in store.chunks] == [1, 1, 0, 0]
        monkeypatch.setattr(shared_reads, "MOST_KEPT", 0)  # descriptors are few
        with reads.open("one more"):
            pass
        assert [chunk.closed for chunk in store.chunks] == [1, 1, 1, 0]
        with reads.open("one more"):
            pass
    assert [chunk.closed for chunk in store.chunks] == [1, 1, 1, 1]
