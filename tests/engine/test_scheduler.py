"""The scheduler's order, fairness and endings, with an engine and slots that are counted tokens instead of a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from conftest import unchecked

import cacheblend_jax as cb
from cacheblend_jax.blend.buckets import FINE_BUCKETS
from cacheblend_jax.engine import scheduler as scheduler_module
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.engine.scheduler import MOST_ASIDE
from cacheblend_jax.engine.slot_batch import Block, Ending
from cacheblend_jax.errors import NotReadyError
from cacheblend_jax.model.logprobs import TokenLogprobs
from cacheblend_jax.runtime.programs import Prepared

NOTHING = np.zeros(0, np.int32)
ENDLESS = 10**6  # tokens: more than are decoded until the test has gone on, however slow the machine
STATS = PrefillStats("full", 1, 0.5, 0.1, 0.0, 0.0, 0, 0, 0, 0, 1, 0.0, 1, 1, wait_s=0.25)


def prompt(number: int, length: int = 1, tenant: str = "") -> cb.Prompt:
    """A prompt whose answer is 100 · number, 100 · number + 1, …"""
    return cb.Prompt([number] * length, tenant=tenant)


def tokens(number: int, count: int) -> list[int]:
    return [100 * number + i for i in range(count)]


@dataclass
class CountingEngine:
    """Prefills at once, or when `gate` opens; logs what it does, as `CountingBatch` does."""

    log: list[object] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failing: dict[int, Exception] = field(default_factory=dict)
    compiling: dict[int, Callable[[], object]] = field(default_factory=dict)
    pauses: dict[int, Callable[[Callable[[], object]], None]] = field(default_factory=dict)
    model: object = field(
        default_factory=lambda: SimpleNamespace(
            config=SimpleNamespace(max_positions=ENDLESS), tokenizer=None, stop_token_ids=(7,), spans_hosts=False
        )
    )
    buckets: object = FINE_BUCKETS
    lanes: int = 1
    gates: dict[int, threading.Event] = field(default_factory=dict)

    def __post_init__(self):
        self.gate.set()

    def check(self, prompt, mode, blend):
        if mode != "blend":
            raise cb.PromptError(f"unknown mode {mode!r}")
        return TokenizedPrompt(np.asarray(prompt.prefix, np.int32), (), NOTHING, tenant=prompt.tenant)

    def prefill(self, prompt, mode, *, blend, only_if_ready, group, between):
        number = int(prompt.prefix[0])
        if only_if_ready and number in self.compiling:
            self.log.append(("waits", number))
            raise NotReadyError("not compiled", self.compiling[number])
        self.log.append(("prefill", number))
        self.began.release()
        self.gate.wait()
        if number in self.gates:
            assert self.gates[number].wait(300)
        if number in self.pauses and between is not None:
            self.pauses[number](between)
        if number in self.failing:
            raise self.failing[number]
        return SimpleNamespace(token_ids=prompt.prefix, next_token=100 * number, stats=STATS)


class CountingBatch:
    failing: ClassVar[list[Exception]] = []
    num_groups = 1

    def __init__(self, model, buckets, num_slots, capacity, num_parts):
        self.num_slots, self.capacity = num_slots, capacity
        self.last: dict[int, int] = {}
        self.log = CURRENT.log

    def preparation(self, length, *, with_logprobs):
        return None

    def group_of(self, slot):
        return None

    def part_of(self, slot):
        return self.group_of(slot) or 0

    def close(self):
        pass

    def first_token(self, out, sampling, *, with_logprobs):
        return Block([out.next_token], [TokenLogprobs(-0.5, ())] * with_logprobs)

    def insert(self, slot, out, token, ending, sampling):
        self.last[slot] = token

    def decode(self, running, steps, *, with_logprobs):
        self.log.append(("decode", steps, [self.last[slot] // 100 for slot in sorted(running)]))
        if self.failing:
            raise self.failing.pop()
        decoded = [Block([], []) for _ in range(self.num_slots)]
        for slot in running:
            tokens = [self.last[slot] + 1 + i for i in range(steps)]
            decoded[slot] = Block(tokens, [TokenLogprobs(float(-token), ()) for token in tokens] * with_logprobs)
            self.last[slot] += steps
        return decoded


CURRENT: CountingEngine


@pytest.fixture
def engine(monkeypatch):
    global CURRENT
    CURRENT = CountingEngine()
    monkeypatch.setattr(scheduler_module, "SlotBatch", CountingBatch)
    monkeypatch.setattr(scheduler_module, "LONGEST_S", 1e6)  # however slow the machine, no step but the tests'
    with unchecked():
        yield CURRENT
        CURRENT.gate.set()


def test_requests_are_answered_in_order_and_more_than_there_are_slots(engine):
    with cb.Scheduler(engine, slots=2) as scheduler:
        answers = [scheduler.submit(prompt(n), max_new_tokens=n + 1) for n in range(7)]
        assert [answer.result().token_ids for answer in answers] == [tokens(n, n + 1) for n in range(7)]
        assert [list(answer) for answer in answers] == [[(t, "") for t in tokens(n, n + 1)] for n in range(7)]
    assert [what[1] for what in engine.log if what[0] == "prefill"] == list(range(7))
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert scheduler.stats == cb.SchedulerStats(0, 0, 2, answered=7, tokens=28)


def test_between_two_prefills_answers_that_run_get_a_token(engine):
    engine.gate.clear()
    with cb.Scheduler(engine, slots=3, steps=4) as scheduler:
        answers = [scheduler.submit(prompt(n), max_new_tokens=6) for n in (1, 2, 3)]
        engine.gate.set()
        assert [answer.result().token_ids for answer in answers] == [tokens(n, 6) for n in (1, 2, 3)]
    assert engine.log[:6] == [
        *(("prefill", 1), ("decode", 1, [1])),  # one step: another prompt waits, and a slot is free
        *(("prefill", 2), ("decode", 1, [1, 2])),
        *(("prefill", 3), ("decode", 4, [1, 2, 3])),
    ]


def test_while_a_long_prompt_is_prefilled_answers_that_run_go_on_by_single_steps(engine):
    def pauses(between):
        for _ in range(3):
            between()
            engine.log.append("layers")

    engine.pauses = {1: pauses, 2: pauses}
    engine.gate.clear()
    with cb.Scheduler(engine, slots=2, steps=4) as scheduler:
        answers = [scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2)]
        engine.gate.set()
        assert [answer.result().token_ids for answer in answers] == [tokens(n, 9) for n in (1, 2)]
    assert engine.log[:10] == [
        *(("prefill", 1), ("decode", 1, [1])),  # nobody was there to go on in a pause
        ("prefill", 2),
        *[("decode", 1, [1]), "layers"] * 3,
        ("decode", 4, [1, 2]),
    ]


def test_a_scheduler_without_pauses_has_none(engine):
    engine.pauses[2] = lambda between: engine.log.append("paused")
    engine.gate.clear()
    with cb.Scheduler(engine, slots=2, steps=4, pausing=False) as scheduler:
        answers = [scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2)]
        engine.gate.set()
        assert [answer.result().token_ids for answer in answers] == [tokens(n, 9) for n in (1, 2)]
    assert "paused" not in engine.log


def test_two_lanes_prefill_two_prompts_and_an_answer_does_not_wait_for_the_other_lane(engine):
    engine.lanes, engine.gates = 2, {2: threading.Event()}
    with cb.Scheduler(engine, slots=3, steps=4) as scheduler:
        with scheduler._changed:  # its thread sees none before all are there
            first, slow, third = (scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2, 3))
        assert first.result().token_ids == tokens(1, 9)
        assert third.result().token_ids == tokens(3, 9)  # in the lane that the first has left
        assert (slow.prefill_stats, scheduler.stats.running) == (None, 1)
        engine.gates[2].set()
        assert slow.result().token_ids == tokens(2, 9)
    assert {what[1] for what in engine.log if what[0] == "decode"} >= {1, 4}  # one step at a time beside prefills


@pytest.mark.parametrize("its_thread", ["is quick", "is slow to end"])
def test_without_pauses_an_answer_gets_one_token_for_each_prefill_that_ends(engine, monkeypatch, its_thread):
    inserted, goes_on, insert = threading.Event(), threading.Event(), cb.Scheduler._insert
    monkeypatch.setattr(cb.Scheduler, "_insert", lambda *of: (insert(*of), inserted.set(), goes_on.wait(20))[0])
    engine.lanes, engine.gates = 2, {2: threading.Event(), 3: threading.Event()}
    with cb.Scheduler(engine, slots=3, steps=4, pausing=False) as scheduler:
        with scheduler._changed:
            answers = [scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2, 3)]
        assert inserted.wait(60)
        if its_thread == "is quick":
            goes_on.set()
        with scheduler._changed:
            scheduler._changed.notify_all()
        assert [next(answers[0])[0] for _ in range(2)] == tokens(1, 2)
        goes_on.set()
        for _ in range(3):
            engine.began.acquire()  # the third in the lane that the first has left
        assert engine.log.count(("decode", 1, [1])) == 1
        engine.gates[3].set()
        assert [next(answers[0])[0], next(answers[2])[0]] == [102, 300]
        engine.gates[2].set()
        assert [answer.result().token_ids for answer in answers] == [tokens(n, 9) for n in (1, 2, 3)]
    decoded = [what[1:] for what in engine.log if what[0] == "decode"]
    assert decoded[:3] == [(1, [1]), (1, [1, 3]), (4, [1, 2, 3])]


def test_pauses_of_two_lanes_at_a_time_are_one(engine):
    one_after_the_other, apart = threading.Lock(), threading.Barrier(2, timeout=60)

    def pauses(between):
        for _ in range(3):
            apart.wait()
            with one_after_the_other:
                between()

    engine.lanes, engine.pauses = 2, {2: pauses, 3: pauses}
    with cb.Scheduler(engine, slots=3, steps=4, max_tokens=ENDLESS) as scheduler:
        first = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(first)
        with scheduler._changed:
            others = [scheduler.submit(prompt(n), max_new_tokens=2) for n in (2, 3)]
        assert [other.result().token_ids for other in others] == [tokens(n, 2) for n in (2, 3)]
        first.cancel()
    began = max(engine.log.index(("prefill", n)) for n in (2, 3))
    steps = [what for what in engine.log[began:] if what[:2] == ("decode", 1) and len(what[2]) == 1]
    assert len(steps) in (3, 4)  # one may come once the first of the prefills has ended


def test_a_slot_that_is_freed_in_a_pause_is_given_to_the_next_request(engine):
    def pauses(between):
        for _ in range(9):
            between()
        assert engine.gates[3].wait(300)

    class Begun(threading.Event):  # what the third request meets when its prefill begins
        def wait(self, timeout=None):
            self.set()
            return True

    engine.lanes, engine.pauses, engine.gates = 2, {2: pauses}, {3: Begun()}
    engine.gate.clear()
    with cb.Scheduler(engine, slots=2, steps=1, max_tokens=ENDLESS) as scheduler:
        ends = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        engine.gate.set()
        next(ends), next(ends)  # it is in its slot by then
        with scheduler._changed:
            others = [scheduler.submit(prompt(n), max_new_tokens=2) for n in (2, 3)]
            scheduler._running[0].ending = Ending(frozenset(), scheduler._running[0].num_tokens + 2)
        assert [other.result().token_ids for other in others] == [tokens(n, 2) for n in (2, 3)]


def test_when_its_thread_fails_also_what_is_set_aside_meanwhile_ends(engine, monkeypatch):
    prefills, fails = threading.Event(), threading.Event()

    def preparation(self, length, *, with_logprobs):
        prefills.set()
        assert fails.wait(300)
        return lambda: None  # not ready: it is set aside

    monkeypatch.setattr(CountingBatch, "preparation", preparation)
    scheduler = cb.Scheduler(engine, slots=2)
    monkeypatch.setattr(scheduler, "_wait_for_prefills", lambda: (prefills.wait(300), fails.set(), 1 / 0))
    answer = scheduler.submit(prompt(1), max_new_tokens=2)
    with pytest.raises(ZeroDivisionError):
        answer.result()
    scheduler.close()


def test_while_groups_of_devices_prefill_nothing_is_decoded(engine, monkeypatch):
    monkeypatch.setattr(CountingBatch, "num_groups", 2)
    monkeypatch.setattr(CountingBatch, "group_of", lambda _, slot: slot // 2)
    engine.gates = {3: threading.Event()}
    with cb.Scheduler(engine, slots=4, steps=1, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(running)
        with scheduler._changed:
            others = [scheduler.submit(prompt(n), max_new_tokens=3) for n in (2, 3, 4)]
        for _ in range(3):
            engine.began.acquire()
        assert next(others[0])[0] == 200  # has its first token before the other group ends
        began = engine.log.index(("prefill", 3))
        assert all(what[0] == "prefill" for what in engine.log[began:])
        engine.gates[3].set()
        assert [other.result().token_ids for other in others] == [tokens(n, 3) for n in (2, 3, 4)]
        running.cancel()


def test_a_block_is_as_long_as_25_ms_have_room_for(engine, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class SlowBatch(CountingBatch):
        def decode(self, running, steps, *, with_logprobs):
            clock.now += steps * (0.002 if engine.log.count("slower") == 0 else 0.010)
            return super().decode(running, steps, with_logprobs=with_logprobs)

    monkeypatch.setattr(scheduler_module, "SlotBatch", SlowBatch)
    monkeypatch.setattr(scheduler_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    engine.pauses[2] = lambda between: engine.log.append("slower")
    with cb.Scheduler(engine, slots=2, steps=20) as scheduler:
        alone = scheduler.submit(prompt(1), max_new_tokens=38)
        assert alone.result().token_ids == tokens(1, 38)
        with scheduler._changed:
            answers = [scheduler.submit(prompt(n), max_new_tokens=90) for n in (3, 2)]
        assert [answer.result().token_ids for answer in answers] == [tokens(n, 90) for n in (3, 2)]
    blocks = [what[1] for what in engine.log if what[0] == "decode"]
    assert blocks[:4] == [1, 12, 12, 12]  # nothing is known at first
    assert blocks[-6:-1] == [2] * 5  # steps take 10 ms by now


def test_a_long_prefill_ends_at_its_next_pause_when_nobody_wants_it(engine):
    paused, cancelled = threading.Event(), threading.Event()

    def pauses(between):
        between()
        paused.set()
        assert cancelled.wait(300)
        between()
        engine.log.append("not ended")

    engine.pauses[2] = pauses
    with cb.Scheduler(engine, slots=2, steps=1, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(running)
        unwanted = scheduler.submit(prompt(2), max_new_tokens=2)
        assert paused.wait(300)
        unwanted.cancel()
        cancelled.set()
        assert scheduler.submit(prompt(3), max_new_tokens=2).result().token_ids == tokens(3, 2)
        running.cancel()
    assert "not ended" not in engine.log
    assert unwanted.prefill_stats is None
    assert (scheduler.stats.cancelled, scheduler.stats.failed, scheduler.stats.running) == (2, 0, 0)


@pytest.mark.parametrize("lanes", [1, 2])
def test_while_a_prefill_waits_without_a_pause_answers_that_run_go_on(engine, monkeypatch, lanes):
    monkeypatch.setattr(scheduler_module, "LONGEST_S", 0.001)
    engine.lanes, engine.gates = lanes, {2: threading.Event(), 3: threading.Event()}
    with cb.Scheduler(engine, slots=3, steps=4, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(running)
        with scheduler._changed:
            slow = [scheduler.submit(prompt(n), max_new_tokens=3) for n in (2, 3)]
        for _ in range(1 + lanes):
            engine.began.acquire()  # the last of these reads stored KV, say, and does not pause
        seen = more_than_now(running, engine, 5)
        assert seen == tokens(1, len(seen) + 1)[1:]
        assert {what[1] for what in engine.log[engine.log.index(("prefill", 2)) :] if what[0] == "decode"} == {1}
        for n in (2, 3):
            engine.gates[n].set()
        assert [answer.result().token_ids for answer in slow] == [tokens(n, 3) for n in (2, 3)]
        running.cancel()


def more_than_now(answer, engine, count):
    """Reads an answer until `count` steps have begun since; fails where none comes."""
    now = len(engine.log)
    with ThreadPoolExecutor(1) as pool:
        read = []
        while len(engine.log) < now + count:
            coming = pool.submit(next, answer)
            try:
                read.append(coming.result(timeout=10)[0])
            except TimeoutError:
                for gate in engine.gates.values():
                    gate.set()
                pytest.fail("the answer stands still")
    return read


def test_a_step_that_the_waiting_thread_has_taken_is_not_taken_again_in_a_pause(engine, monkeypatch):
    stepped, goes_on, decode = threading.Event(), threading.Event(), CountingBatch.decode

    def decode_slowly(self, *of, **how):
        if ("prefill", 2) in engine.log and not stepped.is_set():
            stepped.set()
            assert goes_on.wait(10)
        return decode(self, *of, **how)

    def pauses(between):
        assert stepped.wait(10)  # nobody has paused: the scheduler's thread takes a step
        monkeypatch.setattr(scheduler_module, "LONGEST_S", 1e6)
        engine.log.append("pause")
        threading.Timer(0.01, goes_on.set).start()
        between()  # waits for that step
        engine.log.append("resumed")

    monkeypatch.setattr(CountingBatch, "decode", decode_slowly)
    monkeypatch.setattr(scheduler_module, "LONGEST_S", 0.001)
    engine.pauses = {2: pauses}
    with cb.Scheduler(engine, slots=2, steps=1, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(running)
        assert scheduler.submit(prompt(2), max_new_tokens=2).result().token_ids == tokens(2, 2)
        running.cancel()
    pause = engine.log[engine.log.index("pause") + 1 : engine.log.index("resumed")]
    assert [what[:2] for what in pause] == [("decode", 1)]


def test_a_cancelled_request_that_is_still_read_holds_nobody_up(engine):
    engine.gates = {2: threading.Event()}
    with cb.Scheduler(engine, slots=2, steps=4, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        next(running)
        unwanted = scheduler.submit(prompt(2), max_new_tokens=3)
        for _ in range(2):
            engine.began.acquire()
        unwanted.cancel()
        more_than_now(running, engine, 5)  # whole blocks, though no `LONGEST_S` has passed
        engine.gates[2].set()
        assert scheduler.submit(prompt(3), max_new_tokens=2).result().token_ids == tokens(3, 2)
        running.cancel()
    assert scheduler.stats.cancelled == 2


def test_what_fails_in_a_pause_is_not_the_new_prompts_and_it_goes_on(engine, monkeypatch):
    def pauses(between):
        monkeypatch.setattr(CountingBatch, "failing", [MemoryError("the device is full")])
        between()
        between()

    engine.pauses[2] = pauses
    with cb.Scheduler(engine, slots=2, steps=1, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        after = scheduler.submit(prompt(2), max_new_tokens=9)
        with pytest.raises(MemoryError, match="the device is full"):
            running.result()
        assert after.result().token_ids == tokens(2, 9)
    assert (scheduler.stats.answered, scheduler.stats.failed) == (1, 1)


def test_while_one_request_is_compiled_for_others_go_on_and_pass_it(engine):
    compiled = threading.Event()

    def compile_slowly() -> Prepared:
        assert compiled.wait(300)
        del engine.compiling[2]
        return Prepared(0.001, 0)

    engine.compiling[2] = compile_slowly
    with cb.Scheduler(engine, slots=2, steps=1, max_tokens=ENDLESS) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        waits = scheduler.submit(prompt(2), max_new_tokens=2)
        after = scheduler.submit(prompt(3), max_new_tokens=2)
        assert after.result().token_ids == tokens(3, 2)
        streamed = [next(running)[0] for _ in range(200)]  # more than there were when it began to wait
        assert streamed == tokens(1, 200)
        assert (waits.has_ended, waits.prefill_stats, scheduler.stats.waiting) == (False, None, 1)
        compiled.set()
        stats = waits.result().stats.prefill
        assert waits.result().token_ids == tokens(2, 2)
        running.cancel()
    assert stats.compile_s == 0.001
    waited = stats.wait_s - STATS.wait_s
    assert waited > 0  # for its turn; the compiler's time is left out, as ever
    assert stats.ttft_s == pytest.approx(STATS.ttft_s + waited)
    assert engine.log.count(("waits", 2)) == 1


def test_a_request_that_waits_for_the_compiler_can_be_cancelled_and_fails_alone(engine):
    compiled, failed = threading.Event(), cb.CacheBlendError("no such program")

    def fail() -> None:
        raise failed

    engine.compiling |= {1: lambda: compiled.wait(300), 2: fail}
    scheduler = cb.Scheduler(engine, slots=2)
    cancelled, fails = (scheduler.submit(prompt(n), max_new_tokens=2) for n in (1, 2))
    with pytest.raises(cb.CacheBlendError, match="no such program"):
        fails.result()
    cancelled.cancel()
    late = scheduler.submit(prompt(3), max_new_tokens=2)
    compiled.set()
    scheduler.close()
    assert late.result().token_ids == tokens(3, 2)
    assert [what for what in engine.log if what[0] == "prefill"] == [("prefill", 3)]
    assert scheduler.stats == cb.SchedulerStats(0, 0, 2, answered=1, cancelled=1, failed=1, tokens=2)


def test_what_is_never_ready_is_prefilled_all_the_same_and_closing_waits_for_it(engine):
    engine.compiling[1] = lambda: None
    scheduler = cb.Scheduler(engine, slots=1)
    answer = scheduler.submit(prompt(1), max_new_tokens=2)
    scheduler.close()
    assert answer.result().token_ids == tokens(1, 2)
    assert engine.log[: MOST_ASIDE + 1] == [*[("waits", 1)] * MOST_ASIDE, ("prefill", 1)]


def test_tenants_take_turns_and_each_ones_requests_come_in_order(engine):
    engine.gate.clear()
    with cb.Scheduler(engine, slots=1) as scheduler:
        first = scheduler.submit(prompt(9), max_new_tokens=1)
        engine.began.acquire()
        many = [scheduler.submit(prompt(n, tenant="ada"), max_new_tokens=1) for n in (1, 2, 3)]
        few = [scheduler.submit(prompt(n, tenant="bob"), max_new_tokens=1) for n in (4, 5)]
        many[1].cancel()
        engine.gate.set()
        for answer in (first, many[0], many[2], *few):
            answer.result()
    assert [what[1] for what in engine.log if what[0] == "prefill"] == [9, 1, 4, 3, 5]


def test_an_answer_ends_before_a_stop_token_and_with_its_budget(engine):
    with cb.Scheduler(engine, slots=2, max_tokens=5) as scheduler:
        one = scheduler.submit(prompt(2), max_new_tokens=1)
        stopped = scheduler.submit(prompt(3), max_new_tokens=9, stop_token_ids=[303])
        at_once = scheduler.submit(prompt(4), stop_token_ids=[400])
        full = scheduler.submit(prompt(5, length=4), max_new_tokens=9)
        assert (one.result().token_ids, one.finish_reason) == ([200], "length")
        assert (stopped.result().token_ids, stopped.result().stats.finish_reason) == (tokens(3, 3), "stop")
        assert (at_once.result().token_ids, at_once.finish_reason) == ([], "stop")
        assert (full.result().token_ids, full.finish_reason) == (tokens(5, 2), "length")  # the last token isn't cached
    assert ("decode", 1, [2]) not in engine.log
    assert ("decode", 8, [2]) not in engine.log


def test_time_to_first_token_has_the_time_that_a_request_waited_for_its_prefill(engine):
    with cb.Scheduler(engine) as scheduler:
        answer = scheduler.submit(prompt(1), max_new_tokens=2)
        stats = answer.result().stats
    assert answer.prefill_stats is stats.prefill
    assert stats.prefill.wait_s > STATS.wait_s
    assert stats.ttft_s - STATS.ttft_s == pytest.approx(stats.prefill.wait_s - STATS.wait_s)
    assert stats.decoded == 1


def test_tokens_that_come_together_share_their_time_and_have_logprobs_where_these_were_asked_for(engine):
    with cb.Scheduler(engine, slots=2, steps=4) as scheduler:
        with scheduler._changed:  # both are there before the first token
            plain, with_logprobs = (
                scheduler.submit(prompt(n), max_new_tokens=9, logprobs=asked) for n, asked in ((1, False), (2, True))
            )
        assert with_logprobs.result().token_ids == tokens(2, 9)
        assert plain.result().token_ids == tokens(1, 9)
    assert [with_logprobs.token(n).logprobs.logprob for n in range(9)] == [-0.5, *map(float, range(-201, -209, -1))]
    assert {plain.token(n).logprobs for n in range(9)} == {None}
    seconds = [plain.token(n).seconds for n in range(9)]
    assert min(seconds) > 0
    assert len(set(seconds[-3:])) == 1


def test_a_full_queue_refuses_and_what_cannot_be_served_is_refused_before_it_waits(engine):
    engine.gate.clear()
    with cb.Scheduler(engine, slots=1, max_tokens=8, waiting=2) as scheduler:
        running = scheduler.submit(prompt(1), max_new_tokens=2)
        engine.began.acquire()
        waiting = [scheduler.submit(prompt(n), max_new_tokens=2) for n in (2, 3)]
        assert scheduler.stats == cb.SchedulerStats(waiting=2, running=1, slots=1)
        with pytest.raises(cb.QueueFull, match="2 requests wait already"):
            scheduler.submit(prompt(4))
        others = scheduler.submit(prompt(7, tenant="bob"), max_new_tokens=2)  # who has less than an equal share
        with pytest.raises(cb.QueueFull, match="3 requests wait already"):
            scheduler.submit(prompt(8, tenant="bob"))
        others.cancel()
        waiting[0].cancel()  # makes room
        waiting.append(scheduler.submit(prompt(5), max_new_tokens=2))
        with pytest.raises(cb.PromptError, match=r"has 9 tokens, but a slot .*\(max_tokens\) takes at most 8"):
            scheduler.submit(prompt(6, length=9))
        with pytest.raises(cb.PromptError, match="unknown mode 'fast'"):
            scheduler.submit(prompt(6), mode="fast")
        with pytest.raises(cb.PromptError, match="max_new_tokens must be a whole number of at least 1, got 0"):
            scheduler.submit(prompt(6), max_new_tokens=0)
        engine.gate.set()
        for answer, number in ((running, 1), *zip(waiting[1:], (3, 5), strict=True)):
            assert answer.result().token_ids == tokens(number, 2)
        with pytest.raises(cb.CacheBlendError, match="cancelled before its prefill was done"):
            waiting[0].result()
    assert ("prefill", 2) not in engine.log
    with pytest.raises(cb.CacheBlendError, match="the scheduler is closed"):
        scheduler.submit(prompt(1))
    assert scheduler.stats == cb.SchedulerStats(0, 0, 1, answered=3, cancelled=2, tokens=6)


@pytest.mark.parametrize(
    ("name", "value"), [("slots", 0), ("max_tokens", ENDLESS + 1), ("waiting", True), ("steps", 65), ("steps", 0.5)]
)
def test_numbers_out_of_range_are_named(engine, name, value):
    with pytest.raises(cb.CacheBlendError, match=rf"{name} must be a whole number in \[1, \d+\], got {value}"):
        cb.Scheduler(engine, **{name: value})


def test_a_cancelled_answer_frees_its_slot_and_ends_where_it_is(engine):
    with cb.Scheduler(engine, slots=1, steps=1, max_tokens=ENDLESS) as scheduler:
        endless = scheduler.submit(prompt(1), max_new_tokens=ENDLESS)
        assert next(endless) == (100, "")
        after = scheduler.submit(prompt(2), max_new_tokens=2)
        endless.cancel()
        endless.cancel()
        assert list(endless) == []
        assert after.result().token_ids == tokens(2, 2)
        assert endless.finish_reason == "cancelled"
        got = endless.result()
        assert got.token_ids == tokens(1, len(got.token_ids))
        assert got.stats.finish_reason == "cancelled"
        after.cancel()  # has ended: nothing to cancel
    assert after.finish_reason == "length"
    assert (scheduler.stats.answered, scheduler.stats.cancelled) == (1, 1)


@pytest.mark.parametrize("most", [1, 3])  # it ends as it is prefilled, or in its slot
def test_whoever_reads_an_answers_end_finds_it_counted_and_no_longer_running(engine, monkeypatch, most):
    finish, seen, looks = cb.Answer.finish, [], threading.Thread(target=lambda: seen.append(scheduler.stats))

    def finish_and_look(answer, reason):
        ended = finish(answer, reason)
        looks.start()
        looks.join(0.05)  # waits until the end is counted
        return ended

    monkeypatch.setattr(cb.Answer, "finish", finish_and_look)
    with cb.Scheduler(engine, slots=1) as scheduler:
        assert scheduler.submit(prompt(1), max_new_tokens=most).result().token_ids == tokens(1, most)
    looks.join()
    assert seen == [cb.SchedulerStats(0, 0, 1, answered=1, tokens=most)]


def test_an_answer_cancelled_during_its_prefill_takes_no_slot(engine):
    engine.gate.clear()
    with cb.Scheduler(engine, slots=1) as scheduler:
        answer = scheduler.submit(prompt(1), max_new_tokens=9)
        engine.began.acquire()
        answer.cancel()
        assert list(answer) == []
        engine.gate.set()
        assert scheduler.submit(prompt(2), max_new_tokens=2).result().token_ids == tokens(2, 2)
    assert not any(what[0] == "decode" and 1 in what[2] for what in engine.log)


def test_a_prefill_that_raises_hurts_no_other(engine):
    engine.failing[2] = OSError("no such chunk")
    with cb.Scheduler(engine, slots=2) as scheduler:
        answers = [scheduler.submit(prompt(n), max_new_tokens=12) for n in (1, 2, 3)]
        for read in (answers[1].result, lambda: next(answers[1]), lambda: asyncio.run(anext_of(answers[1]))):
            with pytest.raises(OSError, match="no such chunk"):
                read()
        assert answers[1].finish_reason is None
        assert [answers[n].result().token_ids for n in (0, 2)] == [tokens(1, 12), tokens(3, 12)]
    assert (scheduler.stats.answered, scheduler.stats.failed) == (2, 1)


def test_decoding_that_raises_fails_what_runs_and_nothing_later(engine, monkeypatch):
    monkeypatch.setattr(CountingBatch, "failing", [MemoryError("the device is full")])
    with cb.Scheduler(engine, slots=1) as scheduler:
        failed = scheduler.submit(prompt(1), max_new_tokens=9)
        after = scheduler.submit(prompt(2), max_new_tokens=3)
        assert next(failed) == (100, "")  # tokens that came before the error are read first
        with pytest.raises(MemoryError, match="the device is full"):
            next(failed)
        assert after.result().token_ids == tokens(2, 3)
    assert scheduler.stats == cb.SchedulerStats(0, 0, 1, answered=1, failed=1, tokens=4)


def test_a_thread_that_fails_leaves_nobody_waiting(engine, monkeypatch, caplog):
    engine.gate.clear()
    monkeypatch.setattr(CountingBatch, "decode", lambda *_, **__: [])  # no slot's tokens
    scheduler = cb.Scheduler(engine, slots=1)
    answers = [scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2)]
    engine.gate.set()
    for answer in answers:
        with pytest.raises(IndexError):
            answer.result()
    scheduler.close()
    with pytest.raises(cb.CacheBlendError, match="the scheduler is closed"):
        scheduler.submit(prompt(3))
    assert "its thread has failed" in caplog.text


async def anext_of(answer):
    return await anext(answer)


def test_event_loops_are_woken_and_one_that_is_gone_stops_nobody(engine):
    engine.gate.clear()
    scheduler = cb.Scheduler(engine, slots=4)

    async def read(answer):
        return [token async for token, _ in answer]

    async def read_all():
        readers = [asyncio.ensure_future(read(scheduler.submit(prompt(n), max_new_tokens=20))) for n in (1, 2, 3)]
        await asyncio.sleep(0)  # the readers sleep before the first token comes
        engine.gate.set()
        return await asyncio.gather(*readers)

    gone = scheduler.submit(prompt(9), max_new_tokens=20)

    async def leave():
        reader = asyncio.ensure_future(anext_of(gone))
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(leave())
    assert asyncio.run(read_all()) == [tokens(n, 20) for n in (1, 2, 3)]
    assert gone.result().token_ids == tokens(9, 20)
    scheduler.close()


def test_an_event_loop_reads_the_first_token_before_its_slot_takes_the_interpreter(engine, monkeypatch):
    monkeypatch.setattr(scheduler_module, "READING_S", 300)
    inserted, insert = threading.Event(), CountingBatch.insert
    monkeypatch.setattr(CountingBatch, "insert", lambda *of: (insert(*of), inserted.set())[0])

    async def read(answer):
        first = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)  # it sleeps before the token comes
        engine.gate.set()
        assert not inserted.wait(0.05)
        return [await first, *[token async for token in answer]]

    engine.gate.clear()
    with cb.Scheduler(engine, slots=1) as scheduler:
        told = asyncio.run(read(scheduler.submit(prompt(1), max_new_tokens=5)))
        assert [token for token, _ in told] == tokens(1, 5)
        assert scheduler.submit(prompt(2), max_new_tokens=2).result().token_ids == tokens(2, 2)  # no loop: no waiting


def test_who_asks_to_be_called_is_called_once_something_can_be_read():
    answer, calls = cb.Answer(None, lambda answer: None), []
    answer.when_readable(lambda: calls.append("token"))
    assert calls == []
    answer.add([5])
    answer.when_readable(lambda: calls.append("another"))
    assert calls == ["token", "another"]
    next(answer)
    answer.when_readable(lambda: calls.append("end"))
    assert len(calls) == 2
    answer.finish("stop")
    assert calls == ["token", "another", "end"]


def test_a_call_that_raises_is_logged_and_stops_nobody_else(caplog):
    answer, calls = cb.Answer(None, lambda answer: None), []
    answer.when_readable(lambda: 1 / 0)
    answer.when_readable(lambda: calls.append("token"))
    answer.add([5])
    assert calls == ["token"]
    assert "ZeroDivisionError" in caplog.text


def test_closing_answers_what_was_submitted(engine):
    engine.gate.clear()
    scheduler = cb.Scheduler(engine, slots=1)
    answers = [scheduler.submit(prompt(n), max_new_tokens=9) for n in (1, 2)]
    engine.gate.set()
    scheduler.close()
    scheduler.close()
    assert [answer.finish_reason for answer in answers] == ["length"] * 2
    assert not scheduler._thread.is_alive()


def test_closing_with_a_timeout_cancels_the_rest(engine):
    scheduler = cb.Scheduler(engine, slots=1, steps=1, max_tokens=ENDLESS)
    answers = [scheduler.submit(prompt(n), max_new_tokens=ENDLESS) for n in (1, 2)]
    next(answers[0])
    engine.gate.clear()
    scheduler.flush()  # as when the process ends
    assert [answer.finish_reason for answer in answers] == ["cancelled"] * 2
    assert not scheduler._thread.is_alive()


def test_requests_that_come_during_the_warm_up_wait_and_hold_nobody_up(engine, monkeypatch):
    warms, is_warm = threading.Event(), threading.Event()
    monkeypatch.setattr(CountingBatch, "warm_up", lambda self: (warms.set(), is_warm.wait()), raising=False)
    with cb.Scheduler(engine, slots=1) as scheduler, ThreadPoolExecutor(2) as pool:
        try:
            warming = pool.submit(scheduler.warmup)
            warms.wait()
            answer = pool.submit(scheduler.submit, prompt(1), max_new_tokens=2).result(timeout=300)
            assert (scheduler.stats.waiting, engine.log) == (1, [])
            with pytest.raises(cb.CacheBlendError, match="before the first request"):
                scheduler.warmup()
        finally:
            is_warm.set()
        warming.result()
        assert answer.result().token_ids == tokens(1, 2)


def test_a_request_goes_to_the_group_of_devices_that_has_the_fewest_answers(engine, monkeypatch):
    monkeypatch.setattr(CountingBatch, "num_groups", 2)
    monkeypatch.setattr(CountingBatch, "group_of", lambda _, slot: slot // 2)
    running = SimpleNamespace(answer=SimpleNamespace(has_ended=False))
    with cb.Scheduler(engine, slots=4) as scheduler, scheduler._changed:  # its thread waits for the lock
        for busy, wanted in (({}, [0]), ({0: running}, [2]), ({0: running, 2: running}, [1])):
            scheduler._running, scheduler._prefilling = dict(busy), {}
            scheduler._waiting.add(SimpleNamespace(prompt=prompt(1)))
            assert list(scheduler._next_requests()) == wanted
        scheduler._prefilling = {}
        for number in range(3):
            scheduler._waiting.add(SimpleNamespace(prompt=prompt(number)))
        assert list(scheduler._next_requests()) == [1, 3]
        assert len(scheduler._waiting) == 1  # a group prefills one at a time
        engine.lanes = 2
        assert list(scheduler._next_requests()) == []  # no slot is free
        scheduler._running = {}
        assert list(scheduler._next_requests()) == [0]
        scheduler._running, scheduler._prefilling = {}, {}
