"""What is to be finished before a process ends: flushed while threads can still work."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  (its hook must be registered before ours: they run in reverse)
import logging
import os
import threading
import weakref
from typing import Protocol, runtime_checkable

logger = logging.getLogger(__name__)


@runtime_checkable
class Flushable(Protocol):
    """What finishes its work when told to."""

    def flush(self) -> None:
        """Waits until all is done."""


_unfinished: weakref.WeakSet[Flushable] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # a forked process has them, and not their threads
    os.register_at_fork(after_in_child=_unfinished.clear)


def flush_before_exit(work: Flushable) -> None:
    """Has `work` flushed when the process ends cleanly."""
    _unfinished.add(work)


def finished(work: Flushable) -> None:
    """Undoes `flush_before_exit`."""
    _unfinished.discard(work)


def _flush_all() -> None:
    for work in list(_unfinished):
        try:
            work.flush()
        except Exception:  # the others are to be finished all the same
            logger.exception("what was to be finished before the end could not be")


# `atexit` runs too late: by then no thread pool takes work any more, and Orbax needs some. `_register_atexit` is what
# the standard library's own pools use.
getattr(threading, "_register_atexit", atexit.register)(_flush_all)
