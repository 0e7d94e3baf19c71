"""Stand-alone KV of chunks, found by content."""

from cacheblend_jax.store.chunk_store import ChunkStore, StoreStats
from cacheblend_jax.store.entry import ChunkEntry, StoredChunk
from cacheblend_jax.store.keys import chunk_key
from cacheblend_jax.store.throttled import ThrottledStore

__all__ = ["ChunkEntry", "ChunkStore", "StoreStats", "StoredChunk", "ThrottledStore", "chunk_key"]
