"""Long prefills pause between layers: what they return, when they pause, and what ends them there."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from conftest import HF, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine import groups, pauses
from cacheblend_jax.engine.pauses import PausingLayers, Speed
from cacheblend_jax.errors import NotReadyError

ONE_STAGE = cb.BlendConfig(0.3, "hkvd", num_stages=1)  # after the check layer's: little to compile


@pytest.fixture
def everything_is_long(monkeypatch):
    monkeypatch.setattr("cacheblend_jax.engine.executors.LONGEST_S", 0.0)
    monkeypatch.setattr(pauses, "LONGEST_S", 0.0)


def engine_of(family: str, blend: cb.BlendConfig = ONE_STAGE, **options) -> cb.Engine:
    """An engine that has prefilled something: only then does it know how long prefills take."""
    engine = cb.Engine(family_model(family), blend=blend, **options)
    engine.prefill(cb.Prompt("", (), [1, 2, 3]), "full")
    return engine


def assert_same(out, wanted):
    np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
    assert relative_error(out.logits, wanted.logits) < 2e-6
    assert relative_error(out.cache.k, wanted.cache.k) < 2e-6
    assert relative_error(out.cache.v, wanted.cache.v) < 2e-6
    assert out.next_token == wanted.next_token


@pytest.mark.parametrize(
    ("family", "selector", "mode", "store", "executor"),
    [
        ("qwen2", "query", "blend", {}, "resident"),  # takes all layers twice
        ("gemma3", "hkvd", "full", {}, "resident"),
        ("llama3", "hkvd", "blend", {"kv_dtype": "int8"}, "resident"),
    ],
)
def test_i6_a_prefill_with_pauses_is_the_one_without(everything_is_long, family, selector, mode, store, executor):
    blend = cb.BlendConfig(0.3, selector, num_stages=1)
    engine = engine_of(family, blend, store=cb.ChunkStore(**store), executor=executor)
    prompt, called = random_prompt(1), []
    engine.precompute(prompt)
    out, wanted = engine.prefill(prompt, mode, between=lambda: called.append(1)), engine.prefill(prompt, mode)
    assert_same(out, wanted)
    turns = engine.model.config.num_layers * (2 if selector == "query" else 1)
    assert len(called) == turns - 1  # none once the first token is known
    assert out.stats.executor == wanted.stats.executor == executor


def test_i6_with_pauses_on_a_mesh(everything_is_long):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    engine = cb.Engine(cb.load_model(HF / "qwen3", dtype="float32", mesh=mesh), blend=ONE_STAGE)
    prompt, called = random_prompt(1), []
    engine.precompute(prompt)
    wanted = engine.prefill(prompt)
    assert_same(engine.prefill(prompt, between=lambda: called.append(1)), wanted)
    assert called


def test_short_prefills_and_the_first_one_are_one_program(monkeypatch):
    engine = cb.Engine(family_model("llama2"), blend=ONE_STAGE)
    prompt, called = random_prompt(1), []
    engine.prefill(prompt, between=lambda: called.append(1))
    monkeypatch.setattr("cacheblend_jax.engine.executors.LONGEST_S", 1e9)
    engine.prefill(prompt, between=lambda: called.append(1))
    assert not called


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_what_is_raised_in_a_pause_ends_the_prefill_and_frees_all(everything_is_long, executor, tmp_path):
    engine = engine_of("llama2", store=cb.ChunkStore(tmp_path, host_bytes=1), executor=executor)
    prompt = random_prompt(1)
    engine.precompute(prompt)
    engine.flush()
    wanted, called = engine.prefill(prompt), []
    assert_same(engine.prefill(prompt, between=lambda: called.append(1)), wanted)
    assert len(called) == engine.model.config.num_layers - 1
    threads = {thread.name for thread in threading.enumerate()}

    def leave() -> None:
        raise KeyError("nobody waits")

    with pytest.raises(KeyError, match="nobody waits"):
        engine.prefill(prompt, between=leave)
    assert {thread.name for thread in threading.enumerate()} <= threads
    assert_same(engine.prefill(prompt), wanted)
    assert engine.store.remove(engine.precompute(prompt)[0])  # nobody holds it open


def test_what_pauses_is_compiled_aside_or_by_the_warm_up(monkeypatch):
    engine = cb.Engine(cb.load_model(HF / "llama2", dtype="float32"))
    prompt = random_prompt(1)
    engine.prefill(prompt, "full")
    monkeypatch.setattr("cacheblend_jax.engine.executors.LONGEST_S", 0.0)
    how = {"only_if_ready": True, "between": lambda: None}
    with pytest.raises(NotReadyError) as needed:
        engine.prefill(prompt, "full", **how)
    count = engine.model.runner.count
    needed.value.work()
    assert engine.model.runner.count > count
    engine.prefill(prompt, "full", **how)

    monkeypatch.undo()
    warm = cb.Engine(cb.load_model(HF / "llama2", dtype="float32"), length_buckets=(128,))
    warm.warmup(128, modes=("full",))
    assert warm.warmup(128, modes=("full",), pausing=True) == 0  # nothing is long
    monkeypatch.setattr(pauses, "LONGEST_S", 0.0)
    monkeypatch.setattr("cacheblend_jax.engine.executors.LONGEST_S", 0.0)
    assert warm.warmup(128, modes=("full",), pausing=True) > 0
    count = warm.model.runner.count
    for _ in range(2):  # the first one tells how long prefills take
        warm.prefill(prompt, "full", **how)
    assert warm.model.runner.count == count


def test_an_answer_gets_tokens_while_a_long_prompt_is_prefilled(everything_is_long, monkeypatch):
    monkeypatch.setattr(groups, "num_lanes", lambda model: 1)  # as on an accelerator
    engine = engine_of("llama2")
    prompts = random_prompt(1), random_prompt(2)
    for prompt in prompts:
        engine.precompute(prompt)
        engine.prefill(prompt, between=lambda: None)
    alone = [engine.generate(prompt, max_new_tokens=12, stop_token_ids=()).token_ids for prompt in prompts]
    with cb.Scheduler(engine, slots=2, max_tokens=256, steps=1) as scheduler:
        scheduler.submit(prompts[0], max_new_tokens=2).result()  # all is compiled then
        with scheduler._changed:  # its thread sees neither before both are there
            answers = [scheduler.submit(prompt, max_new_tokens=12, stop_token_ids=()) for prompt in prompts]
        assert [answer.result().token_ids for answer in answers] == alone
    first, second = answers
    # Each layer but the last is followed by a pause.
    came = np.cumsum([first.token(number).seconds for number in range(12)])
    assert second.token(0).seconds > came[engine.model.config.num_layers - 1]


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_pauses_come_before_the_layer_that_would_take_too_long(monkeypatch):
    """Layers of 30 and then 60 ms: three of the first fit into 100 ms, and one of the others."""
    clock, paused = Clock(), []
    monkeypatch.setattr(pauses, "time", clock)

    class Layers:
        def next(self):
            clock.now += layer_s

        def used_until(self, result):
            pass

    layer_s = 0.03
    layers = PausingLayers(Layers(), 9, lambda: (paused.append(number), setattr(clock, "now", clock.now + 5.0)))
    for number in range(1, 10):
        layer_s = 0.03 if number <= 6 else 0.06
        layers.next()
        layers.used_until(jax.numpy.zeros(1))
    assert paused == [3, 6, 7, 8]
    assert layers.paused_s == pytest.approx(20.0)


def test_speed_is_that_of_the_fastest_of_the_last_runs():
    engine = engine_of("llama2")
    short, long = (engine._planner.plan("full", length, 0, 0) for length in (64, 512))
    speed = Speed(engine.model.config)
    assert speed.seconds(long) == 0
    speed.took(short, 1.0)
    speed.took(short, 50.0)  # something held it up
    assert speed.seconds(short) == pytest.approx(1.0)
    assert speed.seconds(long) > 7.0
    for _ in range(pauses.RUNS):
        speed.took(short, 2.0)
    assert speed.seconds(short) == pytest.approx(2.0)
