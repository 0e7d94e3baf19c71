"""Work that no request waits for, beside all of them: compiling what would serve the next one better."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

from cacheblend_jax.runtime.exit_hook import finished, flush_before_exit

logger = logging.getLogger(__name__)


class Aside:
    """Does one piece of work after another in a thread of its own; nothing twice at a time, and what fails once.

    A process that ends waits for what is being done (a compiler that is left alone crashes it), and for nothing else.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cacheblend-compile")
        self._asked: set[Hashable] = set()
        self._asking = threading.Lock()  # guards what is added to it
        flush_before_exit(self)

    def do(self, name: Hashable, work: Callable[[], object]) -> None:
        """Has some work done, unless work of that name waits or is being done."""

        def run() -> None:
            try:
                work()
            except Exception:  # costs later requests time, never an answer
                logger.exception("what later requests would run could not be compiled")
            else:
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

    def flush(self) -> None:
        """Drops what has not begun: the process ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Drops what has not begun."""
        self.flush()
        finished(self)
