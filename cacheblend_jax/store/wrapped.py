"""A store over another, and a handle over another, to which everything is left that a subclass does not say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from etils import epath

from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.protocol import Store
from cacheblend_jax.store.stats import StoreStats
from cacheblend_jax.store.stored_chunk import StoredChunk, StoredRows

Wrapped = TypeVar("Wrapped", bound=Store)
Own = TypeVar("Own", bound="WrappedStore")
OwnChunk = TypeVar("OwnChunk", bound="WrappedChunk")


class WrappedStore(Generic[Wrapped]):
    """A `Store` that does as the wrapped one does; `close` closes it, too."""

    def __init__(self, store: Wrapped) -> None:
        self.wrapped = store

    @property
    def salt(self) -> str:
        """See `Store`."""
        return self.wrapped.salt

    @property
    def directory(self) -> epath.Path | None:
        """See `Store`."""
        return self.wrapped.directory

    @property
    def kv_dtype(self) -> str | None:
        """See `Store`."""
        return self.wrapped.kv_dtype

    @kv_dtype.setter
    def kv_dtype(self, kv_dtype: str | None) -> None:
        self.wrapped.kv_dtype = kv_dtype

    @property
    def host_bytes(self) -> int:
        """See `Store`."""
        return self.wrapped.host_bytes

    @property
    def device_bytes(self) -> int:
        """See `Store`."""
        return self.wrapped.device_bytes

    @property
    def tiers(self) -> tuple[str, ...]:
        """See `Store`."""
        return self.wrapped.tiers

    @property
    def stats(self) -> StoreStats:
        """See `Store`."""
        return self.wrapped.stats

    def open(self, key: str) -> StoredChunk | None:
        """See `Store`."""
        return self.wrapped.open(key)

    def get(self, key: str) -> ChunkEntry | None:
        """See `Store`."""
        return self.wrapped.get(key)

    def put(self, key: str, entry: ChunkEntry, *, wait: bool = False, uses: int = 1) -> bool:
        """See `Store`."""
        return self.wrapped.put(key, entry, wait=wait, uses=uses)

    def promote(self, key: str, to_device: Callable[[ChunkEntry], DeviceEntry] | None = None) -> None:
        """See `Store`."""
        self.wrapped.promote(key, to_device)

    def renew(self, keys: Collection[str]) -> None:
        """See `Store`."""
        self.wrapped.renew(keys)

    def drop_device(self) -> bool:
        """See `Store`."""
        return self.wrapped.drop_device()

    def remove(self, key: str) -> bool:
        """See `Store`."""
        return self.wrapped.remove(key)

    def remembered_context(self) -> str | None:
        """See `Store`."""
        return self.wrapped.remembered_context()

    def remember_context(self, text: str) -> str:
        """See `Store`."""
        return self.wrapped.remember_context(text)

    def check_writable(self) -> None:
        """See `Store`."""
        self.wrapped.check_writable()

    def flush(self) -> None:
        """See `Store`."""
        self.wrapped.flush()

    def close(self) -> None:
        """See `Store`."""
        self.wrapped.close()

    def keys(self) -> list[str]:
        """See `Store`."""
        return self.wrapped.keys()

    def __contains__(self, key: object) -> bool:
        return key in self.wrapped

    def __len__(self) -> int:
        return len(self.wrapped)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WrappedChunk:
    """A `StoredChunk` that does as the wrapped one does."""

    def __init__(self, chunk: StoredChunk) -> None:
        self.wrapped = chunk
        self.shape, self.dtype, self.kv_dtype = chunk.shape, chunk.dtype, chunk.kv_dtype
        self.has_k_offset, self.num_bytes = chunk.has_k_offset, chunk.num_bytes
        self.num_tokens, self.num_layers = chunk.num_tokens, chunk.num_layers
        self.tier, self.device_entry, self.host_entry = chunk.tier, chunk.device_entry, chunk.host_entry

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        return self.wrapped.read_layer(layer, heads)

    def close(self) -> None:
        """See `StoredChunk`."""
        self.wrapped.close()

    def __enter__(self: OwnChunk) -> OwnChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
