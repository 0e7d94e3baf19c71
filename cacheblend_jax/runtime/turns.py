"""How long threads wait for the interpreter's lock, where one of them needs it a thousand times for an instant."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A thread that computes lets go of the lock when another has waited for so long. One that calls numpy gives it up with
# each call and waits for it after each, by default 5 ms, which is ten times as long as a call on 2**16 elements takes.
TURN_SECONDS = 1e-4

_lock = threading.Lock()
_short = 0  # bodies that now ask for short turns
_usual = 0.0


@contextmanager
def short_turns() -> Iterator[None]:
    """In its body, on whatever thread, threads of this process take turns at the interpreter after `TURN_SECONDS`."""
    global _short, _usual
    with _lock:
        if not _short:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, TURN_SECONDS))
        _short += 1
    try:
        yield
    finally:
        with _lock:
            _short -= 1
            if not _short:
                sys.setswitchinterval(_usual)
