"""Entries on their way up, from disk to memory or device: who replaces or removes one meanwhile marks the old one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Load:
    """An entry that is being read or copied; `outdated` once it is not to be kept any more."""

    key: str
    outdated: bool = False


class Loads:
    """The loads in flight of a store, under its lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._loads: set[Load] = set()

    @contextmanager
    def begin(self, key: str) -> Iterator[Load]:
        """Notes a load until it is over: it is to begin before the entry is looked up. Takes the lock."""
        load = Load(key)
        with self._lock:
            self._loads.add(load)
        try:
            yield load
        finally:
            with self._lock:
                self._loads.discard(load)

    def outdate(self, key: str | None = None) -> None:
        """Marks the loads of an entry, or all; for who holds the lock."""
        for load in self._loads:
            load.outdated |= key in (None, load.key)
