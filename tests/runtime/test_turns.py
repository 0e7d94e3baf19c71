"""Short turns at the interpreter's lock: while any body asks for them, and no longer."""

from __future__ import annotations

import sys
import threading

import pytest

from cacheblend_jax.runtime.turns import TURN_SECONDS, short_turns

LONG = 0.005  # Python's own


@pytest.fixture(autouse=True)
def usual():
    before = sys.getswitchinterval()
    sys.setswitchinterval(LONG)
    yield
    sys.setswitchinterval(before)


def test_turns_are_short_until_the_last_body_has_ended():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with short_turns():
            entered.set()
            leave.wait(300)

    thread = threading.Thread(target=other)
    with short_turns():
        thread.start()
        assert entered.wait(300)
    assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS)
    leave.set()
    thread.join()
    assert sys.getswitchinterval() == pytest.approx(LONG)


def test_shorter_turns_stay_and_an_error_ends_short_ones():
    with pytest.raises(ValueError, match="no"), short_turns():
        raise ValueError("no")
    assert sys.getswitchinterval() == pytest.approx(LONG)
    sys.setswitchinterval(TURN_SECONDS / 2)
    with short_turns():
        assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS / 2, rel=0.1)  # it counts whole microseconds
