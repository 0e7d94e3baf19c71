"""What is to be finished before a process ends: called while threads can still work."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  (its hook must be registered before ours: they run in reverse)
import threading
from collections.abc import Callable


def before_exit(finish: Callable[[], None]) -> Callable[[], None]:
    """Calls `finish` when the process ends cleanly, and returns it.

    `atexit` runs too late: by then no thread pool takes work any more, and Orbax needs some.
    `threading._register_atexit` is what the standard library's own pools use.
    """
    getattr(threading, "_register_atexit", atexit.register)(finish)
    return finish
