"""Work that no request waits for, beside all of them: compiling what would serve the next one better."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)


class Aside:
    """Does one piece of work after another in a thread of its own, nothing twice at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cacheblend-compile")
        self._asked: set[Hashable] = set()
        self._asking = threading.Lock()  # guards what is added to it

    def do(self, name: Hashable, work: Callable[[], object]) -> None:
        """Has some work done, unless work of that name waits or is being done."""

        def run() -> None:
            try:
                work()
            except Exception:  # costs later requests time, never an answer
                logger.exception("what later requests would run could not be compiled")
            finally:
                self._asked.discard(name)

        with self._asking:
            if name in self._asked:
                return
            self._asked.add(name)
        try:
            self._thread.submit(run)
        except RuntimeError:  # closed, or no thread can be started
            self._asked.discard(name)

    def wait(self) -> None:
        """Waits until what was asked for is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Drops what has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)
