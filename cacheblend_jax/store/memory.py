"""A tier in memory, the host's or a device's: bounded in bytes; entries seen once go before those seen twice."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from typing import Generic, Protocol, TypeVar

PROTECTED = 0.8  # of the capacity may hold entries seen twice; so new ones always find room


class Sized(Protocol):
    """What takes memory."""

    @property
    def num_bytes(self) -> int:
        """How much."""


Entry = TypeVar("Entry", bound=Sized)


class MemoryTier(Generic[Entry]):
    """A segmented least-recently-used cache. Not safe to use from several threads by itself.

    Entries seen once wait in one queue, those seen twice in another, which holds at most four fifths of the capacity:
    beyond, its least recent count as seen once again. Evicted is the least recent of the first queue, and only where
    that is empty, of the second; a pinned entry never. So a flood of new entries passes by those that are in use.

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

    def get(self, key: str) -> Entry | None:
        """Returns an entry and counts it as seen; `None` where there is none."""
        entry = self.peek(key)
        if entry is None:
            return None
        self._uses[key] += 1
        self._place(key, self._take(key))
        return entry

    def put(self, key: str, entry: Entry, uses: int) -> int | None:
        """Keeps an entry that was seen so often; returns how many others went for it, `None` where it has no room.

        One of the same key goes in any case, others only where that makes room.
        """
        self.remove(key)
        victims = self._victims(entry.num_bytes)
        if victims is None:
            return None
        for victim in victims:
            self.remove(victim)
        self._uses[key] = uses
        self._place(key, entry)
        return len(victims)

    def _victims(self, num_bytes: int) -> list[str] | None:
        """Returns the entries that are to go for so many bytes; `None` where all that are not in use do not suffice."""
        excess = self.bytes + num_bytes - self.capacity
        victims = []
        for name, entry in itertools.chain(self._once.items(), self._twice.items()):
            if excess <= 0:
                break
            if not self._pins[name]:
                victims.append(name)
                excess -= entry.num_bytes
        return victims if excess <= 0 else None

    def peek(self, key: str) -> Entry | None:
        """Returns an entry without counting it as seen."""
        return self._once.get(key) or self._twice.get(key)

    def uses(self, key: str) -> int:
        """Returns how often an entry was seen; 1 where there is none."""
        return self._uses.get(key, 1)

    def pin(self, key: str) -> None:
        """Keeps an entry from being evicted, once more."""
        self._pins[key] += 1

    def unpin(self, key: str) -> None:
        """Undoes one `pin`."""
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]

    def remove(self, key: str) -> None:
        """Drops an entry, if there."""
        if self.peek(key) is not None:
            self._take(key)
            del self._uses[key]

    def keys(self) -> list[str]:
        """Keys in the order in which they would go."""
        return [*self._once, *self._twice]

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
