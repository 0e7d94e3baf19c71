"""Work that an interrupt does not abandon."""

from __future__ import annotations

import signal
import threading
import types
from concurrent.futures import wait

import jax
import jax.numpy as jnp
import pytest

from cacheblend_jax.runtime.exit_hook import several_at_a_time, to_its_end
from cacheblend_jax.runtime.programs import Runner


def test_an_interrupt_ends_the_waiting_and_not_the_work():
    began, go_on, left, done = (threading.Event() for _ in range(4))

    def work() -> None:
        began.set()
        go_on.wait()
        done.set()

    def interrupt_waiting(_: int, frame: types.FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "to_its_end":
                raise KeyboardInterrupt
            frame = frame.f_back

    def interrupt() -> None:
        began.wait()
        while not left.wait(0.05):  # one that lands in a callback of the garbage collector is lost
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    usual = signal.signal(signal.SIGINT, interrupt_waiting)
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            to_its_end(work)
    finally:
        left.set()
        interrupting.join()
        signal.signal(signal.SIGINT, usual)
    (worker,) = (thread for thread in threading.enumerate() if thread.name == "cacheblend-compile")
    assert not worker.daemon  # the process ends after it
    assert not done.is_set()
    go_on.set()
    worker.join()
    assert done.is_set()


def test_an_interrupt_leaves_what_has_not_begun():
    go_on, done = threading.Event(), []

    def task(number: int) -> None:
        go_on.wait()
        done.append(number)

    def interrupted() -> None:
        with several_at_a_time() as workers:
            tasks.extend(workers.submit(task, number) for number in range(100))
            raise KeyboardInterrupt

    tasks: list = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    go_on.set()
    begun = [each for each in tasks if not each.cancelled()]
    wait(begun)
    assert len(done) == len(begun) <= 8
    with several_at_a_time() as workers:
        other = workers.submit(task, 0)
    assert other.done()  # a body that ends well waits for all


def test_what_the_work_returns_or_raises_is_its_callers(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    def fail():
        raise ValueError("no")

    for _ in range(2):
        assert to_its_end(threading.current_thread) is not None
        with pytest.raises(ValueError, match="no"):
            to_its_end(fail)
        monkeypatch.setattr(threading.Thread, "start", start)
    assert to_its_end(threading.current_thread) is threading.main_thread()


def test_programs_are_compiled_where_no_interrupt_comes(monkeypatch):
    threads, compile_ = [], jax.stages.Lowered.compile

    def watched(self, *args, **options):
        threads.append(threading.current_thread())
        return compile_(self, *args, **options)

    runner = Runner("cpu")
    monkeypatch.setattr(jax.stages.Lowered, "compile", watched)
    assert runner(jnp.negative, jnp.ones(3)).tolist() == [-1, -1, -1]
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
