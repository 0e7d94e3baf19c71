"""Which entries are in which tier in memory: what a look-up, a new entry and a promotion do, whatever entries are.

The store's entries hold KV; those of a simulation have a size alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cacheblend_jax.store.memory import MemoryTier, Sized
from cacheblend_jax.store.recent_uses import RecentUses

Hosted = TypeVar("Hosted", bound=Sized)
OnDevice = TypeVar("OnDevice", bound=Sized)
HasRoom = Callable[[int], bool]


@dataclass(frozen=True)
class SplitCopy(Generic[Hosted, OnDevice]):
    """Copies entries to devices that split them: each then holds one of so many equal `shares`."""

    copy: Callable[[Hosted], OnDevice]
    shares: int

    def __call__(self, entry: Hosted) -> OnDevice:
        """Copies an entry."""
        return self.copy(entry)


def shares_of(to_device: Callable[[Any], Any] | None) -> int:
    """Returns into how many shares a copy of an entry is split; any function but a `SplitCopy` leaves it whole."""
    return to_device.shares if isinstance(to_device, SplitCopy) else 1


class TieredMemory(Generic[Hosted, OnDevice]):
    """Two tiers in memory, the host's and a device's, each bounded in bytes.

    Args:
        lock: guards them. Methods take it, unless they say that the caller holds it.
    """

    def __init__(self, host_bytes: int, device_bytes: int, lock: threading.Lock) -> None:
        self.host: MemoryTier[Hosted] = MemoryTier(host_bytes)
        self.device: MemoryTier[OnDevice] = MemoryTier(device_bytes)
        self._recent = RecentUses()
        self._lock = lock

    def use(self, key: str) -> tuple[Hosted | None, OnDevice | None]:
        """Returns an entry, on the host and on the device, and counts a use of it there. The caller holds the lock.

        It counts in both tiers, whichever serves it: both then know of the use.
        """
        return self.host.get(key), self.device.get(key)

    def put(self, key: str, entry: Hosted, uses: int) -> bool:
        """Keeps an entry on the host; returns whether it has room. The caller holds the lock."""
        self.device.remove(key)
        return self.host.put(key, entry, uses)

    def renew(self, keys: Collection[str]) -> None:
        """Has entries go as if they had just been kept, in this order. The caller holds the lock."""
        for key in keys:
            self.host.renew(key)
            self.device.renew(key)

    def count_use(self, key: str) -> None:
        """Remembers that an entry was used, wherever it is."""
        with self._lock:
            self._recent.add(key)

    def promote(
        self,
        key: str,
        read: Callable[[str, HasRoom], tuple[Hosted, int] | None],
        to_device: Callable[[Hosted], OnDevice] | None,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        """Copies an entry into faster tiers than the one that holds it, as far as they have room: see `has_room`.

        Args:
            read: reads it from where it is but in memory, with its uses, if there is room for its size.
            to_device: copies it to the device; `None` leaves the device out.
            is_current: whether it is still the entry of its key; called under the lock.
        """
        with self._lock:
            entry, uses = self.host.peek(key), self.host.uses(key)
            if self.device.peek(key) is not None:
                return
        if entry is None:
            tiers: list[tuple[MemoryTier[Any], int]] = [(self.host, 1)]
            if to_device is not None:
                tiers.append((self.device, shares_of(to_device)))
            loaded = read(key, lambda size: any(self.has_room(tier, key, size // each) for tier, each in tiers))
            if loaded is not None:
                entry, uses = loaded
                if self.has_room(self.host, key, entry.num_bytes):
                    with self._lock:
                        if is_current():
                            self.host.put(key, entry, uses)
        if entry is None or to_device is None:
            return
        if not self.has_room(self.device, key, entry.num_bytes // shares_of(to_device)):
            return
        copy = to_device(entry)
        with self._lock:
            if is_current():
                self.device.put(key, copy, uses)

    def has_room(self, tier: MemoryTier[Any], key: str, num_bytes: int) -> bool:
        """Whether a tier has room for an entry, be it that of others that were used less lately."""
        with self._lock:
            return tier.admits(num_bytes, lambda other: self._recent.exceeds(key, other))

    def remove(self, key: str) -> None:
        """Drops an entry from both tiers. The caller holds the lock."""
        self.host.remove(key)
        self.device.remove(key)

    def clear(self) -> None:
        """Drops every entry. The caller holds the lock."""
        for key in [*self.host.keys(), *self.device.keys()]:
            self.remove(key)

    def keys(self) -> list[str]:
        """Returns the keys of all entries, in the order of eviction. The caller holds the lock."""
        return list(dict.fromkeys([*self.host.keys(), *self.device.keys()]))
