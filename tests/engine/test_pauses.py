"""Long prefills pause between layers: what they return, when they pause, and what ends them there."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from conftest import HF, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.blend import streamed
from cacheblend_jax.blend.layer_step import blends_in_place
from cacheblend_jax.engine import executors, groups, pauses
from cacheblend_jax.engine.delivery import Delivery
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.layer_stream import LayerStream
from cacheblend_jax.engine.pauses import PausingLayers, Speed
from cacheblend_jax.errors import NotReadyError

ONE_STAGE = cb.BlendConfig(0.3, "hkvd", num_stages=1)  # after the check layer's: little to compile


@pytest.fixture
def everything_is_long(monkeypatch):
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
    assert 0 < out.stats.paused_s < out.stats.ttft_s
    assert wanted.stats.paused_s == 0


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
    monkeypatch.setattr(pauses, "LONGEST_S", 1e9)
    engine.prefill(prompt, between=lambda: called.append(1))
    assert not called


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_a_trace_shows_the_pauses(everything_is_long, executor):
    engine, prompt, trace, called = engine_of("llama2", executor=executor), random_prompt(1), cb.Trace(), []
    engine.precompute(prompt)
    stats = engine.prefill(prompt, trace=trace, between=lambda: called.append(trace.clock())).stats
    shown = trace.lane("pause")
    assert trace.lanes()[-1] == "pause"
    assert len(called) == len(shown)
    assert all(span.began <= at <= span.ended for span, at in zip(shown, called, strict=True))
    assert sum(span.ended - span.began for span in shown) == pytest.approx(stats.paused_s)
    assert len(trace.lane("compute")) == engine.model.config.num_layers
    if executor == "resident":  # of a streamed layer, another thread notices the end
        assert trace.overlap_s("compute", "pause") == 0
    plain = cb.Trace()
    engine.prefill(prompt, trace=plain)
    assert "pause" not in plain.lanes()


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_speed_is_taken_without_pauses_and_without_loading(everything_is_long, executor, monkeypatch):
    engine, prompt, clock, taken = engine_of("llama2", executor=executor), random_prompt(1), Clock(), []
    called: list[int] = []
    engine.precompute(prompt)
    load, take = Delivery.load, LayerStream.next
    monkeypatch.setattr(Delivery, "load", lambda *arguments: (clock.pass_by(50.0), load(*arguments))[1])
    monkeypatch.setattr(
        LayerStream, "next", lambda stream: (clock.pass_by(5.0), wait_for(stream, 5.0), take(stream))[2]
    )
    monkeypatch.setattr(executors, "prefill_streamed", lambda *of, **how: (clock.pass_by(3.0), layers(*of, **how))[1])
    layers = streamed.prefill_streamed
    monkeypatch.setattr(Speed, "took", lambda speed, plan, seconds: taken.append(seconds))
    monkeypatch.setattr(executors, "time", clock)
    monkeypatch.setattr(pauses, "time", clock)
    stats = engine.prefill(prompt, between=lambda: (clock.pass_by(7.0), called.append(1))).stats
    assert stats.load_s == pytest.approx(
        50.0 if executor == "resident" else 5.0 * engine.model.config.num_layers, abs=1
    )
    assert called
    assert stats.paused_s == 7.0 * len(called)
    assert taken == [pytest.approx(3.0, abs=1.0)]
    stats = engine.prefill(prompt).stats
    # Without pauses it is one program that nothing is timed in, or layers are computed while others are waited for.
    assert taken[1:] == [pytest.approx(0.0 if executor == "resident" else 3.0 + stats.load_s, abs=1.0)]


def wait_for(stream: LayerStream, seconds: float) -> None:
    stream.waited_s += seconds


@pytest.mark.parametrize(("platform", "kv_dtype"), [("cpu", None), ("tpu", None), ("cpu", "int8")])
def test_stored_kv_becomes_the_blended_or_is_counted_beside_it(everything_is_long, monkeypatch, platform, kv_dtype):
    in_place = platform == "cpu" and kv_dtype is None
    monkeypatch.setattr(executors, "blends_in_place", lambda _: blends_in_place(platform))
    blend = cb.BlendConfig(0.3, "query", num_stages=1)  # the question pass reads what is blended into later
    engine, prompt = engine_of("llama2", blend, store=cb.ChunkStore(kv_dtype=kv_dtype)), random_prompt(1)
    engine.precompute(prompt)
    wanted, load, stored = engine.prefill(prompt), Delivery.load, []
    monkeypatch.setattr(Delivery, "load", lambda *of: (stored.append(load(*of)), stored[-1])[1])
    out = engine.prefill(prompt, between=lambda: None)
    assert_same(out, wanted)
    assert all(array.is_deleted() == in_place for array in jax.tree.leaves(stored))
    programs = engine._prefiller._groups.first._prepare_plan(out.plan, "by layer", kv_dtype).peak_memory_bytes
    beside = 0 if in_place else sum(array.nbytes for array in jax.tree.leaves(stored))
    assert out.stats.peak_memory_bytes == programs + beside


def test_what_others_raise_in_a_pause_is_not_taken_for_the_prefills_lack_of_memory(everything_is_long, monkeypatch):
    engine, prompt, dropped, called = engine_of("llama2"), random_prompt(1), [], []
    engine.precompute(prompt)
    monkeypatch.setattr(Executors, "_give_way", lambda self: dropped.append(1) or True)
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    def decode() -> None:
        called.append(1)
        raise exhausted

    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        engine.prefill(prompt, between=decode)
    assert raised.value is exhausted
    assert (len(called), dropped) == (1, [])


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_what_is_raised_in_a_pause_ends_the_prefill_and_frees_all(everything_is_long, executor, tmp_path):
    engine = engine_of("llama2", store=cb.ChunkStore(tmp_path, host_bytes=1), executor=executor)
    prompt = random_prompt(1)
    engine.precompute(prompt)
    engine.flush()
    wanted, called = engine.prefill(prompt), []
    assert_same(engine.prefill(prompt, between=lambda: called.append(1)), wanted)
    assert len(called) == engine.model.config.num_layers - 1

    def leave() -> None:
        raise KeyError("nobody waits")

    with pytest.raises(KeyError, match="nobody waits"):
        engine.prefill(prompt, between=leave)
    assert "cacheblend-lane" not in {thread.name for thread in threading.enumerate()}  # a stream's thread
    assert_same(engine.prefill(prompt), wanted)
    assert engine.store.remove(engine.precompute(prompt)[0])  # nobody holds it open


def test_what_pauses_is_compiled_aside_or_by_the_warm_up(monkeypatch):
    engine = cb.Engine(cb.load_model(HF / "llama2", dtype="float32"))
    prompt = random_prompt(1)
    engine.prefill(prompt, "full")
    monkeypatch.setattr(pauses, "LONGEST_S", 0.0)
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
    assert warm.warmup(128, modes=("full",), pausing=True) > 0
    count = warm.model.runner.count
    for _ in range(2):  # the first one tells how long prefills take
        warm.prefill(prompt, "full", **how)
    assert warm.model.runner.count == count


def test_what_is_bearable_runs_whole_while_what_pauses_is_compiled(monkeypatch):
    engine, prompt, called, compiled = engine_of("llama2"), random_prompt(1), [], []
    engine.precompute(prompt)
    wanted = engine.prefill(prompt)
    monkeypatch.setattr(pauses, "LONGEST_S", 1e-9)
    monkeypatch.setattr(Executors, "is_ready", lambda *_, pausing=False: bool(compiled) or not pausing)
    monkeypatch.setattr(
        groups.Groups, "preparation", lambda *_, pausing=False: lambda: (running.wait(60), compiled.append(pausing))
    )
    running, how = threading.Event(), {"only_if_ready": True, "between": lambda: called.append(1)}
    with pytest.raises(NotReadyError):  # nobody can bear to wait for it
        engine.prefill(prompt, **how)
    monkeypatch.setattr(pauses, "BEARABLE", 1e12)
    for _ in range(2):
        assert_same(engine.prefill(prompt, **how), wanted)
    assert (called, compiled) == ([], [])
    running.set()
    engine._prefiller._aside.wait()
    assert compiled == [True]  # once
    assert_same(engine.prefill(prompt, **how), wanted)
    assert called


def test_while_a_tier_fails_what_would_pause_is_asked_for_as_it_would_run(everything_is_long):
    class FailingStore(cb.ChunkStore):
        fails = False

        @property
        def tiers(self) -> tuple[str, ...]:
            return ("device",) if self.fails else super().tiers

    model, prompt, how = cb.load_model(HF / "llama2", dtype="float32"), random_prompt(1), {"between": lambda: None}
    with cb.Engine(model, blend=ONE_STAGE) as other:  # compiles what a prompt without stored chunks takes, by layer
        for _ in range(2):
            other.prefill(prompt, **how)
            other.flush()
            other.store.clear()
    store = FailingStore()
    engine = cb.Engine(model, store, ONE_STAGE)
    engine.precompute(prompt)
    engine.prefill(prompt)  # as one program
    store.fails = True
    assert not any(engine.prefill(prompt, only_if_ready=True, **how).stats.loaded)
    assert all(engine.prefill(prompt, only_if_ready=True).stats.loaded)


def test_the_controller_is_told_of_what_would_pause_as_it_would_run(everything_is_long, monkeypatch):
    asked, engine, prompt = [], engine_of("llama2", cb.BlendConfig("auto", "hkvd", num_stages=1)), random_prompt(1)
    engine.precompute(prompt)
    engine._prefiller.is_warm = True
    monkeypatch.setattr(Executors, "is_prepared", lambda *_, pausing: bool(asked.append(pausing)))
    engine.prefill(prompt, between=lambda: None)
    assert asked
    assert all(asked)
    asked.clear()
    engine.prefill(prompt)
    assert asked
    assert not any(asked)


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
    came = first._first_at + np.cumsum([first.token(number).seconds for number in range(1, 12)])
    assert second._first_at > came[engine.model.config.num_layers - 2]


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_pauses_come_before_the_layer_that_would_take_too_long(monkeypatch):
    """Layers of 30 and then 60 ms: three of the first fit into 100 ms, and one of the others."""
    clock, paused = Clock(), []
    monkeypatch.setattr(pauses, "time", clock)

    class Layers:
        def next(self):
            clock.now += layer_s

        def placed(self, blended):
            return blended

        def used_until(self, result):
            pass

    layer_s = 0.03
    layers = PausingLayers(Layers(), 9, lambda: (paused.append(number), setattr(clock, "now", clock.now + 5.0)))
    for number in range(1, 10):
        layer_s = 0.03 if number <= 6 else 0.06
        layers.next()
        layers.used_until(jax.numpy.zeros(1))
    assert paused == [3, 6, 7, 8]
    assert pauses.total_s(layers.pauses) == pytest.approx(20.0)
    assert all(resumed - began == pytest.approx(5.0) for began, resumed in layers.pauses)


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
