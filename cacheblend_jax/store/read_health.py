"""How reads from a directory go: failures are counted and logged, and after a few of them it is left alone."""

from __future__ import annotations

from cacheblend_jax.store.breaker import Breaker
from cacheblend_jax.store.disk_log import DiskLog


class ReadHealth:
    """The breaker of a directory's reads, and what the log says of it. Thread-safe."""

    def __init__(self, log: DiskLog, breaker: Breaker) -> None:
        self._log, self._breaker = log, breaker

    @property
    def is_good(self) -> bool:
        """Whether entries are to be read, or else count as missing."""
        return self._breaker.is_closed

    def skipped(self) -> bool:
        """Counts an entry that is not looked up; returns whether the caller is to have it read, as a probe."""
        self._log.count("skipped")
        return self._breaker.wants_probe()

    def failed(self, message: str) -> None:
        """Counts a failure of the file system, which says nothing of the entry's bytes."""
        self._log.warn_once(message, "read_errors")
        if self._breaker.failed():
            self._log.warn(
                f"reading has failed repeatedly: until it succeeds again, which is tried every "
                f"{self._breaker.pause_s:g} s, entries on disk count as missing; last failure: {message}"
            )

    def succeeded(self) -> None:
        """Notes that an entry was read."""
        if self._breaker.succeeded():
            self._log.warn("reading succeeds again: entries on disk are used")
