"""What a chunk store has in memory: entries on the host and on the device, and which of them were used lately."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.memory import MemoryTier
from cacheblend_jax.store.recent_uses import RecentUses
from cacheblend_jax.store.stored_chunk import DeviceChunk, HostChunk


class MemoryTiers:
    """A store's tiers in memory, each bounded in bytes.

    Args:
        lock: the store's, which guards them. Methods take it, unless they say that the caller holds it.
    """

    def __init__(self, host_bytes: int, device_bytes: int, lock: threading.Lock) -> None:
        self.host: MemoryTier[ChunkEntry] = MemoryTier(host_bytes)
        self.device: MemoryTier[DeviceEntry] = MemoryTier(device_bytes)
        self._recent = RecentUses()
        self._lock = lock

    def open(self, key: str) -> HostChunk | DeviceChunk | None:
        """Returns a handle on an entry, which stays until the handle is closed; `None` where there is none."""
        with self._lock:
            entry = self.host.get(key)  # also where the device serves it: both tiers then know of the use
            if (on_device := self.device.get(key)) is not None:
                self.device.pin(key)
            elif entry is not None:
                self.host.pin(key)
        if on_device is not None:
            return DeviceChunk(on_device, lambda: self._unpin(self.device, key))
        return None if entry is None else HostChunk(entry, lambda: self._unpin(self.host, key))

    def peek(self, key: str) -> ChunkEntry | DeviceEntry | None:
        """Returns an entry without counting a use. The caller holds the lock."""
        return self.host.peek(key) or self.device.peek(key)

    def hold(self, key: str) -> ExitStack | None:
        """Keeps an entry on the host until the result is closed; `None` where there is none."""
        with self._lock:
            if self.host.peek(key) is None:
                return None
            self.host.pin(key)
        held = ExitStack()
        held.callback(self._unpin, self.host, key)
        return held

    def remove(self, key: str) -> None:
        """Drops an entry from both tiers. The caller holds the lock."""
        self.host.remove(key)
        self.device.remove(key)

    def clear(self) -> None:
        """Drops every entry. The caller holds the lock."""
        for key in [*self.host.keys(), *self.device.keys()]:
            self.remove(key)

    def count_use(self, key: str) -> None:
        """Remembers that an entry was used, wherever it is."""
        with self._lock:
            self._recent.add(key)

    def has_room(self, tier: MemoryTier[Any], key: str, num_bytes: int) -> bool:
        """Whether a tier has room for an entry, be it that of others that were used less lately."""
        with self._lock:
            return tier.admits(num_bytes, lambda other: self._recent.exceeds(key, other))

    def keys(self) -> list[str]:
        """Returns the keys of all entries, in the order of eviction. The caller holds the lock."""
        return list(dict.fromkeys([*self.host.keys(), *self.device.keys()]))

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each entry, by key."""
        with self._lock:
            entries = {key: self.peek(key) for key in self.keys()}
        return {key: entry.num_bytes for key, entry in entries.items() if entry is not None}

    def _unpin(self, tier: MemoryTier[Any], key: str) -> None:
        with self._lock:
            tier.unpin(key)
