"""A circuit breaker: leaves alone what has failed a few times in a row, and finds out when it works again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum

MAX_FAILURES = 3  # in a row, before what fails is left alone
PAUSE_SECONDS = 30.0  # between two probes of what is left alone


class State(Enum):
    """Whether something is used (`CLOSED`), left alone (`OPEN`), or left alone while one probe is under way."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Decides whether something that may fail is used. Thread-safe.

    It is closed at first. `max_failures` in a row open it. Every `pause_s` seconds from then on, a caller is asked to
    probe; the first success closes it again. A probe of which nothing is heard is followed by another one.

    Args:
        max_failures: how many failures in a row open it.
        pause_s: seconds between its opening and the first probe, and between probes.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        *,
        max_failures: int = MAX_FAILURES,
        pause_s: float = PAUSE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pause_s = pause_s
        self.state = State.CLOSED
        self._max_failures, self._clock = max_failures, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._probe_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether what it guards is to be used."""
        return self.state is State.CLOSED

    def wants_probe(self) -> bool:
        """Returns whether the caller is to probe: true for one caller once a pause is over."""
        with self._lock:
            if self.state is State.CLOSED or self._clock() < self._probe_at:
                return False
            self.state = State.PROBING
            self._probe_at = self._clock() + self.pause_s
            return True

    def failed(self) -> bool:
        """Notes a failure; returns whether it has opened the breaker."""
        with self._lock:
            self._failures += 1
            opens = self.state is State.CLOSED and self._failures >= self._max_failures
            if opens or self.state is State.PROBING:
                self.state = State.OPEN
                self._probe_at = self._clock() + self.pause_s
            return opens

    def succeeded(self) -> bool:
        """Notes a success; returns whether it has closed the breaker."""
        if self.state is State.CLOSED and not self._failures:  # nearly always: no need for the lock
            return False
        with self._lock:
            closes = self.state is not State.CLOSED
            self.state, self._failures = State.CLOSED, 0
            return closes
