"""Entries in host memory that are page-locked where they lie, for as long as they live: all engines share the locks."""

from __future__ import annotations

import math
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cacheblend_jax.runtime.link import PageLock
from cacheblend_jax.store import ChunkEntry

LOCKED_SHARE = 0.5  # of the host's memory, at most, is page-locked

PageLocker = Callable[[np.ndarray], PageLock | None]


@dataclass
class _Held:
    """An array's lock, and how many entries have the array: a store keeps what it was given, perhaps twice."""

    lock: PageLock
    num_bytes: int
    users: int = 0


class EntryLocks:
    """Page-locks entries' arrays. Safe to use from several threads.

    An entry may be dropped by any thread, with any lock in its hands, and giving memory back takes the system its time:
    so a thread of its own does that.
    """

    def __init__(self) -> None:
        self._is_locked: weakref.WeakKeyDictionary[ChunkEntry, bool] = weakref.WeakKeyDictionary()
        self._held: dict[int, _Held] = {}  # by address
        self._bytes = 0
        self._locking = threading.Lock()
        self._dropped: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
        self._unlocker: threading.Thread | None = None

    def lock(self, entries: Sequence[ChunkEntry], page_lock: PageLocker) -> bool:
        """Page-locks K and V of entries, where they are not yet; returns whether all are.

        What cannot be page-locked is not tried again.

        Args:
            page_lock: page-locks an array; returns `None` where it cannot.
        """
        if all(self._is_locked.get(entry, False) for entry in entries):
            return True
        with self._locking:
            for entry in entries:
                if entry not in self._is_locked:
                    if self._bytes + entry.num_bytes > LOCKED_SHARE * _memory_bytes():
                        return False
                    self._is_locked[entry] = self._lock(entry, page_lock)
            return all(self._is_locked[entry] for entry in entries)

    @property
    def num_bytes(self) -> int:
        """Bytes that are page-locked."""
        return self._bytes

    def _lock(self, entry: ChunkEntry, page_lock: PageLocker) -> bool:
        arrays = entry.k, entry.v
        for array in arrays:
            if array.ctypes.data not in self._held:
                if (lock := page_lock(array)) is None:
                    self._release([other.ctypes.data for other in arrays])
                    return False
                self._held[array.ctypes.data] = _Held(lock, array.nbytes)
                self._bytes += array.nbytes
        addresses = tuple(array.ctypes.data for array in arrays)
        for address in addresses:
            self._held[address].users += 1
        weakref.finalize(entry, self._dropped.put, addresses).atexit = False  # the process's end unlocks all
        if self._unlocker is None:
            self._unlocker = threading.Thread(target=self._unlock_dropped, name="cacheblend-unlock", daemon=True)
            self._unlocker.start()
        return True

    def _unlock_dropped(self) -> None:
        while True:
            addresses = self._dropped.get()
            with self._locking:
                for address in addresses:
                    self._held[address].users -= 1
                self._release(addresses)

    def _release(self, addresses: Sequence[int]) -> None:
        """Unlocks the arrays among these that no entry has."""
        for address in addresses:
            if (held := self._held.get(address)) is not None and held.users == 0:
                del self._held[address]
                self._bytes -= held.num_bytes
                held.lock.release()


ENTRY_LOCKS = EntryLocks()  # memory is locked once, whoever reads it


def _memory_bytes() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system says
        return math.inf
