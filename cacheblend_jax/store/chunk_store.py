"""The chunk store: entries by key, bounded in bytes, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.stored_chunk import HostChunk, StoredChunk

DEFAULT_HOST_BYTES = 4 * 2**30


@dataclass
class StoreStats:
    """Counts since the store was made; `bytes` and `entries` are what it holds now."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    rejected: int = 0  # larger than the whole store
    entries: int = 0
    bytes: int = 0


class ChunkStore:
    """Keeps chunk KV in host memory, at most `host_bytes` of it; the least recently used entries go first.

    Safe to use from several threads. An entry that is larger than the whole store is not kept (and counted in
    `stats.rejected`): nothing is evicted for it. Entries are read-only.

    Args:
        directory: `None`: memory only.
        host_bytes: capacity in bytes.
        salt: part of every key: stores with different salts share nothing, even over the same chunks.

    Raises:
        CacheBlendError: a capacity that is not positive, or a directory, which this version does not write to.
    """

    def __init__(
        self, directory: str | Path | None = None, *, host_bytes: int = DEFAULT_HOST_BYTES, salt: str = ""
    ) -> None:
        if directory is not None:
            raise CacheBlendError(
                f"a store in a directory ({str(directory)!r}) is not in this version; use ChunkStore(host_bytes=…)"
            )
        if not isinstance(host_bytes, int) or isinstance(host_bytes, bool) or host_bytes < 1:
            raise CacheBlendError(f"host_bytes must be a whole number of at least 1, got {host_bytes!r}")
        self.directory = directory
        self.host_bytes = host_bytes
        self.salt = salt
        self._entries: OrderedDict[str, ChunkEntry] = OrderedDict()
        self._stats = StoreStats()
        self._lock = threading.Lock()

    def get(self, key: str) -> ChunkEntry | None:
        """Returns the entry and marks it as just used; `None` where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._stats.misses += 1
                return None
            self._entries.move_to_end(key)
            self._stats.hits += 1
            return entry

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle on the entry, pinned against eviction until it is closed; `None` where there is none."""
        entry = self.get(key)
        return None if entry is None else HostChunk(entry)

    def put(self, key: str, entry: ChunkEntry) -> bool:
        """Stores an entry, evicting others as needed; returns whether it is kept."""
        for array in (entry.k, entry.v):
            array.flags.writeable = False
        with self._lock:
            if entry.num_bytes > self.host_bytes:
                self._stats.rejected += 1
                return False
            self._drop(key)
            while self._stats.bytes + entry.num_bytes > self.host_bytes:
                self._drop(next(iter(self._entries)))
                self._stats.evicted += 1
            self._entries[key] = entry
            self._stats.stored += 1
            self._stats.entries += 1
            self._stats.bytes += entry.num_bytes
            return True

    def clear(self) -> None:
        """Drops every entry."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    @property
    def stats(self) -> StoreStats:
        """A snapshot of the counts."""
        with self._lock:
            return replace(self._stats)

    def keys(self) -> list[str]:
        """Keys held, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._stats.entries -= 1
            self._stats.bytes -= entry.num_bytes
