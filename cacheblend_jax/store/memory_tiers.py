"""What a chunk store has in memory: entries on the host and on the device, and handles that keep them there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.memory import MemoryTier
from cacheblend_jax.store.stored_chunk import DeviceChunk, HostChunk
from cacheblend_jax.store.tiered_memory import TieredMemory


class MemoryTiers(TieredMemory[ChunkEntry, DeviceEntry]):
    """A store's tiers in memory, each bounded in bytes: see `TieredMemory`."""

    def open(self, key: str) -> HostChunk | DeviceChunk | None:
        """Returns a handle on an entry, which stays until the handle is closed; `None` where there is none."""
        with self._lock:
            entry, on_device = self.use(key)
            if on_device is not None:
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

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each entry, by key."""
        with self._lock:
            entries = {key: self.peek(key) for key in self.keys()}
        return {
            key: entry.whole_bytes if isinstance(entry, DeviceEntry) else entry.num_bytes
            for key, entry in entries.items()
            if entry is not None
        }

    def _unpin(self, tier: MemoryTier[Any], key: str) -> None:
        with self._lock:
            tier.unpin(key)
