"""A tier of any speed, over any store: for tests, and for planning with storage that this machine does not have."""

from __future__ import annotations

import time
from collections.abc import Callable

from cacheblend_jax.runtime.throttle import Throttle
from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.protocol import Store
from cacheblend_jax.store.stored_chunk import StoredChunk, StoredRows
from cacheblend_jax.store.wrapped import WrappedChunk, WrappedStore


class ThrottledStore(WrappedStore[Store]):
    """A `Store` whose reads take as long as from a tier of that latency and bandwidth, which all its readers share.

    Its entries claim to be on that one tier, wherever the wrapped store, which does everything but reading, keeps them.

    Args:
        store: the store to slow down; `close` closes it.
        bytes_per_s: bandwidth of all reads together.
        latency_s: seconds before each read's first byte; latencies of concurrent reads overlap.
        tier: the tier that entries claim to be on.
        clock: returns the time in seconds.
        sleep: waits so many seconds.

    Raises:
        CacheBlendError: a bandwidth that is not positive and finite, or a latency that is negative or not finite.
    """

    def __init__(
        self,
        store: Store,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        tier: str = "disk",
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._throttle = Throttle(bytes_per_s, latency_s, clock=clock, sleep=sleep)
        super().__init__(store)
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.tier = tier

    @property
    def device_bytes(self) -> int:
        """0: nothing is promoted to the device."""
        return 0

    @property
    def tiers(self) -> tuple[str, ...]:
        """The one tier that entries claim to be on."""
        return (self.tier,)

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

    def promote(self, key: str, to_device: Callable[[ChunkEntry], DeviceEntry] | None = None) -> None:
        """Does nothing: throttled entries stay where they are."""

    def wait_for(self, num_bytes: int) -> None:
        """Waits as long as a read of `num_bytes` takes, behind the reads that came before."""
        self._throttle.wait_for(num_bytes)


class ThrottledChunk(WrappedChunk):
    """A handle of a `ThrottledStore`."""

    def __init__(self, chunk: StoredChunk, store: ThrottledStore) -> None:
        super().__init__(chunk)
        self._store, self.tier, self.device_entry, self.host_entry = store, store.tier, None, None

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """As `StoredChunk.read_layer`, after the time that it takes on the throttled tier."""
        layer_bytes, kv_heads = self.num_bytes // self.num_layers, self.shape[2]
        self._store.wait_for(layer_bytes if heads is None else layer_bytes * len(heads) // kv_heads)
        return super().read_layer(layer, heads)
