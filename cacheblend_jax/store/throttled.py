"""A tier of any speed, over any store: for tests, and for planning with storage that this machine has not got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.entry import ChunkEntry, StoredChunk


class ThrottledStore:
    """A store whose reads take as long as from a tier of that bandwidth, shared by all its readers, and latency.

    Everything else is the wrapped store's. Its entries say that they are on `tier`.

    Args:
        store: the store to slow down.
        bytes_per_s: bandwidth of all reads together.
        latency_s: seconds before each read's first byte; latencies of concurrent reads overlap.
        tier: what the entries say they are on.
        clock: seconds now.
        sleep: waits so many seconds.

    Raises:
        CacheBlendError: a bandwidth that is not positive and finite, or a negative latency.
    """

    device_bytes = 0  # see `promote`

    def __init__(
        self,
        store: Any,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        tier: str = "disk",
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < bytes_per_s < float("inf"):
            raise CacheBlendError(f"bytes_per_s must be positive and finite, got {bytes_per_s!r}")
        if not 0 <= latency_s < float("inf"):
            raise CacheBlendError(f"latency_s must be at least 0 and finite, got {latency_s!r}")
        self.wrapped = store
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.tier = tier
        self._clock, self._sleep = clock, sleep
        self._free_at = float("-inf")
        self._lock = threading.Lock()

    def open(self, key: str) -> ThrottledChunk | None:
        """Returns a handle whose reads are throttled; `None` where the wrapped store has no such entry."""
        chunk = self.wrapped.open(key)
        return None if chunk is None else ThrottledChunk(chunk, self)

    def get(self, key: str) -> ChunkEntry | None:
        """Returns the entry after the time that reading all of it takes."""
        entry = self.wrapped.get(key)
        if entry is not None:
            self.wait_for(entry.num_bytes)
        return entry

    def promote(self, key: str, to_device: Any = None) -> None:
        """Does nothing: what is throttled stays where it is."""

    def wait_for(self, num_bytes: int) -> None:
        """Waits as long as a read of `num_bytes` takes, behind the reads that came before."""
        with self._lock:
            began = max(self._clock() + self.latency_s, self._free_at)
            self._free_at = ends = began + num_bytes / self.bytes_per_s
        if (seconds := ends - self._clock()) > 0:
            self._sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __contains__(self, key: object) -> bool:
        return key in self.wrapped

    def __len__(self) -> int:
        return len(self.wrapped)


class ThrottledChunk:
    """A handle of a `ThrottledStore`."""

    def __init__(self, chunk: StoredChunk, store: ThrottledStore) -> None:
        self._chunk, self._store = chunk, store
        self.num_tokens, self.num_layers, self.num_bytes = chunk.num_tokens, chunk.num_layers, chunk.num_bytes
        self.tier = store.tier

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """As `StoredChunk.read_layer`, after the time that it takes on the slower tier."""
        self._store.wait_for(self.num_bytes // self.num_layers)
        return self._chunk.read_layer(layer)

    def close(self) -> None:
        """Unpins the chunk."""
        self._chunk.close()

    def __enter__(self) -> ThrottledChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
