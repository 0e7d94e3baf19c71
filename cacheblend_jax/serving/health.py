"""Whether a server is ready, and what of it fails: for load balancers, and for people."""

from __future__ import annotations

import threading
from typing import Any

from cacheblend_jax.store import Store

STARTING, READY, DEGRADED, STOPPING = "starting", "ready", "degraded", "stopping"


class Health:
    """A server's state. A tier that fails costs time, never an answer: the server is then degraded, but ready.

    Args:
        store: whose tiers are watched.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._tiers = store, store.tiers
        self._lock = threading.Lock()
        self._is_warm = self._stops = False
        stats = store.stats
        self._written, self._write_errors = stats.written, stats.write_errors
        self._writes_fail = False

    def warmed_up(self) -> None:
        """The programs that requests need are compiled."""
        self._is_warm = True

    def stopping(self) -> None:
        """No more requests are taken."""
        self._stops = True

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._is_warm and not self._stops

    @property
    def is_stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stops

    def report(self) -> dict[str, Any]:
        """Returns the state, and the reasons where it is degraded."""
        reasons = self._reasons()
        if not self.is_ready:
            return {"status": STOPPING if self._stops else STARTING, "reasons": reasons}
        return {"status": DEGRADED if reasons else READY, "reasons": reasons}

    def _reasons(self) -> list[str]:
        missing = [tier for tier in self._tiers if tier not in self._store.tiers]
        reasons = [f"reads from the {tier} tier fail: its entries count as missing" for tier in missing]
        stats = self._store.stats
        with self._lock:
            if stats.written > self._written:
                self._writes_fail = False
            if stats.write_errors > self._write_errors:
                self._writes_fail = True
            self._written, self._write_errors = stats.written, stats.write_errors
            if self._writes_fail:
                reasons.append("writes to the disk tier fail: new entries stay in memory")
        if stats.unwritable:
            reasons.append("the disk tier cannot be written: new entries stay in memory")
        return reasons
