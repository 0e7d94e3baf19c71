"""Stand-alone KV of chunks, found by content."""

from cacheblend_jax.store.chunk_store import ChunkStore
from cacheblend_jax.store.device import DeviceChunk, DeviceEntry
from cacheblend_jax.store.entry import ChunkEntry, StoredChunk, is_slow
from cacheblend_jax.store.keys import chunk_key
from cacheblend_jax.store.location import is_local, located
from cacheblend_jax.store.stats import StoreStats
from cacheblend_jax.store.throttled import ThrottledStore

__all__ = [
    "ChunkEntry",
    "ChunkStore",
    "DeviceChunk",
    "DeviceEntry",
    "Store",
    "StoreStats",
    "StoredChunk",
    "ThrottledStore",
    "chunk_key",
    "is_local",
    "is_slow",
    "located",
]
