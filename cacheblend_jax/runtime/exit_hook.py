"""Work to finish before the process ends: flushed, or run to its end, while threads can still run."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.thread import ThreadPoolExecutor  # registers its hook before ours: they run in reverse
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@runtime_checkable
class Flushable(Protocol):
    """An object that can finish its pending work."""

    def flush(self) -> None:
        """Waits until all work is done."""


_unfinished: weakref.WeakSet[Flushable] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # a forked process inherits the objects, but not their threads
    os.register_at_fork(after_in_child=_unfinished.clear)


def flush_before_exit(work: Flushable) -> None:
    """Registers `work` to be flushed when the process ends cleanly."""
    _unfinished.add(work)


def finished(work: Flushable) -> None:
    """Undoes `flush_before_exit`."""
    _unfinished.discard(work)


def to_its_end(work: Callable[[], Result]) -> Result:
    """Calls `work`, which an interrupt (Ctrl-C) does not abandon: it ends the waiting, and the process ends after both.

    Interrupted, JAX stops waiting for its compiler (0.10), whose threads run on. If the process ends meanwhile, they
    crash it: what they use is taken down under them.
    """
    if threading.current_thread() is not threading.main_thread():  # no other is interrupted
        return work()
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=run, name="cacheblend-compile", daemon=False).start()
    except RuntimeError:  # no more threads
        return work()
    return outcome.result()


@contextmanager
def several_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Gives threads for tasks that compile; where the body raises (Ctrl-C, say), those that have not begun never do."""
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="cacheblend-compile")
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()


def _flush_all() -> None:
    for work in list(_unfinished):
        try:
            work.flush()
        except Exception:  # the others must be finished all the same
            logger.exception("pending work could not be finished before exit")


# `atexit` runs too late: by then no thread pool accepts work, and Orbax needs one. The standard library's own pools use
# `_register_atexit`, too.
getattr(threading, "_register_atexit", atexit.register)(_flush_all)
