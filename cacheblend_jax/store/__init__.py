"""Stand-alone KV of chunks, found by content."""

from typing import TYPE_CHECKING

from cacheblend_jax.runtime.lazy_names import imported

if TYPE_CHECKING:
    from cacheblend_jax.store.chunk_store import ChunkStore
    from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
    from cacheblend_jax.store.keys import chunk_key
    from cacheblend_jax.store.places import is_local, located
    from cacheblend_jax.store.protocol import Store
    from cacheblend_jax.store.stats import StoreStats, TierStats
    from cacheblend_jax.store.stored_chunk import DeviceChunk, StoredChunk, is_slow
    from cacheblend_jax.store.tenants import TenantStore
    from cacheblend_jax.store.throttled import ThrottledStore

__all__ = [
    "ChunkEntry",
    "ChunkStore",
    "DeviceChunk",
    "DeviceEntry",
    "Store",
    "StoreStats",
    "StoredChunk",
    "TenantStore",
    "ThrottledStore",
    "TierStats",
    "chunk_key",
    "is_local",
    "is_slow",
    "located",
]
_HOMES = ("entry", "keys", "stats", "stored_chunk", "protocol", "places", "throttled", "chunk_store", "tenants")


def __getattr__(name: str) -> object:
    return imported(__name__, name, __all__, _HOMES)
