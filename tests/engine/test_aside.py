"""Work beside all requests: what is asked for again, and what is left when nobody needs it any more."""

from __future__ import annotations

import threading

from cacheblend_jax.engine.aside import Aside


def test_what_was_done_may_be_asked_for_again_and_what_failed_may_not(caplog):
    aside, done = Aside(), []

    def fails() -> None:
        done.append("failed")
        raise ValueError("it does not compile")

    for _ in range(2):
        aside.do("works", lambda: done.append("worked"))
        aside.do("fails", fails)
        aside.wait()
    assert done == ["worked", "failed", "worked"]
    assert "it does not compile" in caplog.text
    aside.close()


def test_what_has_not_begun_is_dropped():
    aside, done, may_end, has_begun = Aside(), [], threading.Event(), threading.Event()

    def first() -> None:
        has_begun.set()
        may_end.wait(60)
        done.append("first")

    aside.do("first", first)
    aside.do("second", lambda: done.append("second"))
    assert has_begun.wait(60)
    aside.close()
    may_end.set()
    aside._thread.shutdown()
    aside.do("third", lambda: done.append("third"))
    assert done == ["first"]
