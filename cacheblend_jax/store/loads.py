"""Entries on their way from disk to memory or the device, which must not arrive once replaced or removed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Load:
    """An entry being read or copied; `outdated` once it has been replaced or removed, and must not be kept."""

    key: str
    outdated: bool = False


class Loads:
    """A store's loads in flight.

    Args:
        lock: the store's, which guards them.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._loads: set[Load] = set()

    @contextmanager
    def begin(self, key: str) -> Iterator[Load]:
        """Registers a load for the body, which looks the entry up. Takes the lock."""
        load = Load(key)
        with self._lock:
            self._loads.add(load)
        try:
            yield load
        finally:
            with self._lock:
                self._loads.discard(load)

    def outdate(self, key: str | None = None) -> None:
        """Marks the loads of an entry, or all loads, as outdated. The caller holds the lock."""
        for load in self._loads:
            load.outdated |= key in (None, load.key)
