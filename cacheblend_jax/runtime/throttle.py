"""Waiting as long as bytes take at a bandwidth that all users share: what simulated tiers and links are made of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cacheblend_jax.errors import CacheBlendError


class Throttle:
    """A bandwidth that all who wait share, and a latency, which overlaps.

    Args:
        bytes_per_s: bandwidth of all together.
        latency_s: seconds before the first byte.
        clock: returns the time in seconds.
        sleep: waits so many seconds.

    Raises:
        CacheBlendError: a bandwidth that is not positive and finite, or a latency that is negative or not finite.
    """

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < bytes_per_s < float("inf"):
            raise CacheBlendError(f"bytes_per_s must be positive and finite, got {bytes_per_s!r}")
        if not 0 <= latency_s < float("inf"):
            raise CacheBlendError(f"latency_s must be at least 0 and finite, got {latency_s!r}")
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._clock, self._sleep = clock, sleep
        self._free_at = float("-inf")
        self._lock = threading.Lock()

    def wait_for(self, num_bytes: int) -> None:
        """Waits as long as `num_bytes` take, behind those that came before."""
        with self._lock:
            began = max(self._clock() + self.latency_s, self._free_at)
            self._free_at = ends = began + num_bytes / self.bytes_per_s
        if (seconds := ends - self._clock()) > 0:
            self._sleep(seconds)
