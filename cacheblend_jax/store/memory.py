"""A tier in memory, the host's or a device's: bounded in bytes; entries seen once go before those seen twice."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from cacheblend_jax.store.stats import TierStats

PROTECTED = 0.8  # of the capacity, at most, for entries seen twice: new ones then always find room


@runtime_checkable
class Sized(Protocol):
    """Anything that takes memory."""

    @property
    def num_bytes(self) -> int:
        """How many bytes of it."""


Entry = TypeVar("Entry", bound=Sized)


class MemoryTier(Generic[Entry]):
    """A segmented least-recently-used cache. Not thread-safe by itself.

    Entries seen once wait in one queue and those seen twice in another, which holds at most four fifths of the
    capacity: beyond that, its least recent entry moves back to the first queue. Entries are evicted from the first
    queue, least recent first, and from the second once the first is empty; pinned entries never are. So a flood of new
    entries does not displace those in use.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._once: OrderedDict[str, Entry] = OrderedDict()
        self._twice: OrderedDict[str, Entry] = OrderedDict()
        self._twice_bytes = 0
        self._uses: dict[str, int] = {}
        self._pins: Counter[str] = Counter()
        self._evicted = self._rejected = 0

    def get(self, key: str) -> Entry | None:
        """Returns an entry and counts a use; `None` where there is none."""
        entry = self.peek(key)
        if entry is None:
            return None
        self._uses[key] += 1
        self._place(key, self._take(key))
        return entry

    def renew(self, key: str) -> None:
        """Moves an entry, if there is one, behind the others of its queue. Counts no use."""
        if self.peek(key) is not None:
            self._place(key, self._take(key))

    def put(self, key: str, entry: Entry, uses: int) -> bool:
        """Keeps an entry that has been used so often; returns whether it has room.

        It replaces one of the same key in any case, and evicts others only where that makes room for it.
        """
        self.remove(key)
        victims = self._victims(entry.num_bytes)
        if victims is None:
            self._rejected += 1
            return False
        for victim in victims:
            self.remove(victim)
        self._evicted += len(victims)
        self._uses[key] = uses
        self._place(key, entry)
        return True

    def _victims(self, num_bytes: int) -> list[str] | None:
        """Returns the entries to evict for so many bytes; `None` where no eviction makes enough room."""
        excess = self.bytes + num_bytes - self.capacity
        victims = []
        for name, entry in itertools.chain(self._once.items(), self._twice.items()):
            if excess <= 0:
                break
            if not self._pins[name]:
                victims.append(name)
                excess -= entry.num_bytes
        return victims if excess <= 0 else None

    def admits(self, num_bytes: int, goes_before: Callable[[str], bool]) -> bool:
        """Returns whether so many bytes find room where only entries of which `goes_before` is true are evicted."""
        victims = self._victims(num_bytes)
        return victims is not None and all(map(goes_before, victims))

    def peek(self, key: str) -> Entry | None:
        """Returns an entry without counting a use."""
        return self._once.get(key) or self._twice.get(key)

    def uses(self, key: str) -> int:
        """Returns how often an entry has been used; 1 where there is none."""
        return self._uses.get(key, 1)

    def pin(self, key: str) -> None:
        """Keeps an entry from being evicted until a matching `unpin`."""
        self._pins[key] += 1

    def unpin(self, key: str) -> None:
        """Undoes one `pin`."""
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]

    def remove(self, key: str) -> None:
        """Drops an entry if there is one."""
        if self.peek(key) is not None:
            self._take(key)
            del self._uses[key]

    def drop(self) -> bool:
        """Drops all entries that are not pinned; returns whether there were any."""
        unpinned = [name for name in self.keys() if not self._pins[name]]
        for name in unpinned:
            self.remove(name)
        return bool(unpinned)

    def keys(self) -> list[str]:
        """Returns the keys in the order in which their entries would be evicted."""
        return [*self._once, *self._twice]

    def stats(self, hits: int) -> TierStats:
        """Returns the tier's counts, with the hits that the store has counted."""
        return TierStats(hits, len(self), self.bytes, self._evicted, self._rejected)

    def __len__(self) -> int:
        return len(self._once) + len(self._twice)

    def _place(self, key: str, entry: Entry) -> None:
        self.bytes += entry.num_bytes
        if self._uses[key] < 2:
            self._once[key] = entry
            return
        self._twice[key] = entry
        self._twice_bytes += entry.num_bytes
        while self._twice_bytes > PROTECTED * self.capacity and len(self._twice) > 1:
            oldest, demoted = self._twice.popitem(last=False)
            self._twice_bytes -= demoted.num_bytes
            self._uses[oldest] = 1
            self._once[oldest] = demoted

    def _take(self, key: str) -> Entry:
        entry = self._once.pop(key, None)
        if entry is None:
            entry = self._twice.pop(key)
            self._twice_bytes -= entry.num_bytes
        self.bytes -= entry.num_bytes
        return entry
