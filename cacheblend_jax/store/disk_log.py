"""What happens to a store's directory: counted, and reported in the log without flooding it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Literal

from etils import epath

logger = logging.getLogger(__name__)
Counted = Literal[
    "written", "evicted", "rejected", "unwritable", "damaged", "outdated", "write_errors", "read_errors", "skipped"
]


class DiskLog:
    """Counts and warnings of one directory, by the names that `StoreStats` gives them. Thread-safe."""

    def __init__(self, root: epath.Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._counts: Counter[Counted] = Counter()
        self._warned: set[Counted] = set()

    def count(self, what: Counted, number: int = 1) -> None:
        """Adds to a count."""
        with self._lock:
            self._counts[what] += number

    def counts(self) -> dict[Counted, int]:
        """Returns the counts that are not zero."""
        with self._lock:
            return dict(self._counts)

    def warn(self, message: str) -> None:
        """Logs a warning that names the store, on one line: SQLite's errors quote a schema with its line breaks."""
        logger.warning("store %s: %s", self._root, " ".join(message.split()))

    def warn_once(self, message: str, what: Counted) -> None:
        """Counts what happened, and logs the message unless one for the same count has been logged."""
        with self._lock:
            self._counts[what] += 1
            new = what not in self._warned
            self._warned.add(what)
        if new:
            self.warn(message)
