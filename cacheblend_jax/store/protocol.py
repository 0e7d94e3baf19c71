"""What an engine needs of a store, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol, runtime_checkable

from etils import epath

from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.stats import StoreStats
from cacheblend_jax.store.stored_chunk import StoredChunk


@runtime_checkable
class Store(Protocol):
    """Chunk KV by key. Safe to use from several threads; entries are read-only.

    `ChunkStore` is the one that keeps entries; `ThrottledStore` slows another down.

    Attributes:
        kv_dtype: of the codes that entries are stored as from now on; `None`: their values are stored as they are.
            Entries of any kind may be in a store, and are served. An engine whose device lacks the dtype changes it.
    """

    kv_dtype: str | None

    @property
    def salt(self) -> str:
        """Part of every key: stores with different salts share no entries."""

    @property
    def directory(self) -> epath.Path | None:
        """Where entries outlive the process: an absolute path or a URL; `None` for a store in memory only."""

    @property
    def host_bytes(self) -> int:
        """Capacity in host memory."""

    @property
    def device_bytes(self) -> int:
        """Capacity in the device's memory, or each device's of a mesh; 0 where it keeps nothing there."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that `open` may serve from, fastest first: see `StoredChunk.tier`.

        One that fails may be left out for a while.
        """

    @property
    def stats(self) -> StoreStats:
        """A snapshot of the counts."""

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle that reads the entry layer by layer, for use in a `with`; `None` where there is none.

        The entry is not evicted from its tier before the handle is closed.
        """

    def get(self, key: str) -> ChunkEntry | None:
        """Returns the whole entry; `None` where there is none."""

    def put(self, key: str, entry: ChunkEntry, *, wait: bool = False, uses: int = 1) -> bool:
        """Stores an entry; returns whether any tier keeps it.

        Args:
            wait: where too much waits to be written to disk, wait too instead of leaving the disk out.
            uses: how many requests have used the entry; 0 for one that is stored in advance.
        """

    def promote(self, key: str, to_device: Callable[[ChunkEntry], DeviceEntry] | None = None) -> None:
        """Copies an entry into faster tiers than the one that holds it. This does not count as a use.

        Args:
            to_device: copies an entry to the device; `None` leaves the device tier out.
        """

    def renew(self, keys: Collection[str]) -> None:
        """Has entries go as if they had just been stored, in this order. This does not count as a use.

        A key without an entry changes nothing.
        """

    def drop_device(self) -> bool:
        """Gives the device the memory back of the entries there that nobody uses; returns whether there were any."""

    def remove(self, key: str) -> bool:
        """Drops an entry from every tier; returns whether there was one.

        Raises:
            CacheBlendError: the directory cannot be written.
        """

    def remembered_context(self) -> str | None:
        """Returns the text that chunks are precomputed after in this store; `None` where none is remembered."""

    def remember_context(self, text: str) -> str:
        """Remembers a text that chunks are to be precomputed after, unless one is; returns the one that is then.

        Raises:
            CacheBlendError: the directory cannot be written.
        """

    def check_writable(self) -> None:
        """Checks that the store can keep entries where it was told to.

        Raises:
            CacheBlendError: the directory cannot be written.
        """

    def flush(self) -> None:
        """Waits until every entry stored so far has been written to disk, or could not be."""

    def close(self) -> None:
        """Flushes and lets the directory go. Calling it again does nothing."""

    def keys(self) -> list[str]:
        """Returns the keys of all entries."""

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...
