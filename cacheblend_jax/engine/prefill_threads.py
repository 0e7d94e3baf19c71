"""Threads of one prefill: they are started, or the request says why not, and they trace what runs on the device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.runtime.trace import Trace


def start_lane(
    work: Callable[[], None], cannot: str = "load its stored KV", instead: str = "use executor='resident'"
) -> threading.Thread:
    """Starts a thread of a prefill.

    Args:
        cannot, instead: what the request cannot do without, and what helps.

    Raises:
        CacheBlendError: the process has no more threads.
    """
    thread = threading.Thread(target=work, name="cacheblend-lane")
    try:
        thread.start()
    except RuntimeError as error:
        raise CacheBlendError(
            f"a request cannot {cannot}: {error}; let the process have more threads (ulimit -u), or {instead}"
        ) from error
    return thread


class TracedLane:
    """Traces work on the device, of which one piece follows another: a thread waits for the results of each.

    Args:
        lane: of the trace.

    Raises:
        CacheBlendError: the thread cannot be started.
    """

    def __init__(self, trace: Trace, lane: str) -> None:
        self._trace, self._lane = trace, lane
        self._begun: queue.SimpleQueue[tuple[int, Any, float, threading.Event] | None] = queue.SimpleQueue()
        self._thread = start_lane(self._watch, "be traced", "leave the trace out")

    def add(self, layer: int, results: Any, dispatched: float | None = None) -> threading.Event:
        """Adds a piece of work, by what it computes or sends; returns what is set once it is traced.

        Args:
            dispatched: when, by `time.perf_counter`; `None`: just now.
        """
        traced = threading.Event()
        self._begun.put((layer, results, time.perf_counter() if dispatched is None else dispatched, traced))
        return traced

    def close(self) -> None:
        """Waits until all work is done and traced."""
        self._begun.put(None)
        self._thread.join()

    def _watch(self) -> None:
        free_at = 0.0
        while (begun := self._begun.get()) is not None:
            layer, results, dispatched, traced = begun
            with suppress(jax.errors.JaxRuntimeError):  # who reads it fails, too, and says so
                jax.block_until_ready(results)
            began, free_at = max(dispatched, free_at), time.perf_counter()
            self._trace.add(self._lane, f"layer {layer}", layer, began, free_at)
            traced.set()
