"""The chunk store: entries by key, on the device, in host memory and on disk, each bounded in bytes."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING

from etils import epath

from cacheblend_jax.store.checks import check_capacity, check_dtype, check_text, is_text
from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry, QueuedEntry
from cacheblend_jax.store.loads import Load, Loads
from cacheblend_jax.store.memory_tiers import MemoryTiers
from cacheblend_jax.store.quantise import check_kv_dtype
from cacheblend_jax.store.record import EntryRecord
from cacheblend_jax.store.stats import DiskStats, StoreStats, TierStats
from cacheblend_jax.store.stored_chunk import HostChunk, StoredChunk
from cacheblend_jax.store.tiered_memory import HasRoom

if TYPE_CHECKING:
    from cacheblend_jax.store.persistent import PersistentTier

DEFAULT_HOST_BYTES = 4 * 2**30
DEFAULT_QUEUE_BYTES = 2**30


class ChunkStore:
    """A `Store` that keeps chunk KV in host memory, in a directory if it has one, and on the device if it has room.

    Each tier is bounded in bytes. The least recently used entries are evicted first, those used once before those used
    twice, and never one in use. An entry read from disk is kept in memory too; one that a request found in memory or on
    disk is copied to the device for the next, as far as `device_bytes` allow. Writing to disk happens in the
    background; reading checks every byte. The store is safe to use from several threads, and several processes of a
    machine may share a directory. Entries are read-only.

    Failures of the file system never fail a request: an entry that cannot be written stays in memory, and one that
    cannot be read is a miss. An entry with a wrong checksum is a miss too, and is quarantined. All of these are counted
    in `stats`, and each kind is logged once.

    Args:
        directory: a path, made if missing; a directory that is there must be empty, or a store. Or a URL that Orbax and
            TensorStore accept (`gs://…`), which then serves one writing process. `None`: memory only.
        host_bytes: capacity of host memory.
        disk_bytes: capacity of the directory: all its files but the index and the quarantine. `None`: 64 GiB, or as
            much as the directory already holds if that is more.
        device_bytes: capacity of the device, or of each on a mesh, which the model and its prefills then lack (where
            one finds no memory, the entries there go); 0: entries are copied to the device with each request. Engines
            that stream every layer make no use of it.
        salt: part of every key: stores with different salts share nothing, even over the same chunks. Over one
            directory, each sees, counts and removes its own entries only; they share the directory's capacity.
        queue_bytes: how much may wait to be written. Entries of requests beyond that stay in memory only.
        kv_dtype: `"int8"` or `"float8_e4m3fn"`: K and V are quantised as they are put, one scale per token and KV head.
            `None`: they stay as they are. Entries of any kind that are there already are served.

    Raises:
        CacheBlendError: a capacity that is not positive; a salt that is no text; an unknown `kv_dtype`; a directory
            that is a file, cannot be made, has other files in it, or has a backslash in its path.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        host_bytes: int = DEFAULT_HOST_BYTES,
        disk_bytes: int | None = None,
        device_bytes: int = 0,
        salt: str = "",
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        kv_dtype: str | None = None,
    ) -> None:
        check_kv_dtype(kv_dtype)
        check_capacity("host_bytes", host_bytes, least=1)
        if disk_bytes is not None:
            check_capacity("disk_bytes", disk_bytes, least=1)
        check_capacity("queue_bytes", queue_bytes, least=1)
        check_capacity("device_bytes", device_bytes, least=0)
        check_text("salt", salt)
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.directory: epath.Path | None = None
        self.salt = salt
        self.kv_dtype = kv_dtype
        self._context: str | None = None  # where there is no directory to remember it
        self._disk: PersistentTier | None = None
        self._disk_at_close = DiskStats()
        self._lock = threading.Lock()
        self._memory = MemoryTiers(host_bytes, device_bytes, self._lock)
        self._loads = Loads(self._lock)
        self._hits: Counter[str] = Counter()  # by tier
        self._misses = self._stored = self._dropped = 0
        self._closed = False
        if directory is not None:
            # Importing TensorStore and SQLite takes a quarter of a second, which a store in memory need not spend.
            from cacheblend_jax.store.persistent import PersistentTier

            self._disk = PersistentTier(directory, disk_bytes, queue_bytes, salt)
            self.directory = self._disk.root

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that `open` may serve from, fastest first; without the disk while reading from it fails."""
        disk = self._disk
        there = {"device": self.device_bytes > 0, "host": True, "disk": disk is not None and disk.is_readable}
        return tuple(tier for tier, is_there in there.items() if is_there)

    def get(self, key: str) -> ChunkEntry | None:
        """Returns the entry, keeps it in host memory from then on, and counts a use; `None` where there is none.

        An entry found damaged on disk is quarantined and counted, and is `None`.
        """
        check_text("key", key)
        with self._loads.begin(key) as load:
            entry = self._from_memory(load)
            if entry is not None:
                return entry
            disk = self._disk
            loaded = None if disk is None else disk.load(key)
            with self._lock:
                if loaded is None:
                    self._misses += 1
                    return None
                entry, uses = loaded
                self._hits["disk"] += 1
                self._keep_loaded(load, entry, uses + 1)
        self._touch(key)
        return entry

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle that reads the entry layer by layer, for use in a `with`; `None` where there is none.

        The entry is not evicted from its tier before the handle is closed. One that is read from disk is not copied
        into memory: `promote` does that.
        """
        check_text("key", key)
        chunk = self._open(key)
        with self._lock:
            if chunk is None:
                self._misses += 1
            else:
                self._hits[chunk.tier] += 1
        if chunk is not None:
            self._touch(key)
        return chunk

    def promote(self, key: str, to_device: Callable[[ChunkEntry], DeviceEntry] | None = None) -> None:
        """Copies an entry that is only on disk into memory. Counts no use, and does nothing for a damaged one.

        A full tier makes room only where the entries that would go were used less, lately, than this one: of entries
        that are all used alike and do not all fit, the same ones stay.

        Args:
            to_device: copies an entry to the device, where it is kept too as far as `device_bytes` allow.
        """
        check_text("key", key)
        with self._loads.begin(key) as load:
            self._memory.promote(key, self._read, to_device, lambda: not load.outdated)

    def renew(self, keys: Collection[str]) -> None:
        """Has entries go as if they had just been stored, in this order. This does not count as a use."""
        for key in keys:
            check_text("key", key)
        with self._lock:
            self._memory.renew(keys)
        if (disk := self._disk) is not None:
            disk.renew(keys)

    def drop_device(self) -> bool:
        """Gives the device the memory back of the entries there that nobody uses; returns whether there were any."""
        with self._lock:
            return self._memory.device.drop()

    def put(self, key: str, entry: ChunkEntry, *, wait: bool = False, uses: int = 1) -> bool:
        """Keeps an entry in memory and queues it for the disk; returns whether it is kept anywhere.

        The arrays are copied unless nobody else can write them: see `ChunkEntry.hand_over`.

        Args:
            wait: where the queue is full, wait for room instead of leaving the disk out.
            uses: how many requests have used the entry; 0 for one that is stored in advance.

        Raises:
            CacheBlendError: the key is not a str that UTF-8 can encode; all methods that take a key raise this. Or the
                entry is of a dtype that no model's KV has.
        """
        check_text("key", key)
        check_dtype(entry)
        entry = entry.quantised(self.kv_dtype).kept()
        with self._lock:
            self._loads.outdate(key)
            kept = self._memory.put(key, entry, uses)
        queued = False
        disk = self._disk
        if disk is not None and not disk.writable:
            disk.count_unwritable()
        elif disk is not None and not self._closed:
            queued = disk.submit(QueuedEntry(key, entry, uses), wait=wait)
            with self._lock:
                if not queued:
                    self._dropped += 1
                self._loads.outdate(key)  # a load begun meanwhile may have found the entry's predecessor on disk
                if not kept:
                    self._memory.host.remove(key)
        with self._lock:
            self._stored += kept or queued
        return kept or queued

    def remembered_context(self) -> str | None:
        """Returns the text that chunks are precomputed after in this store; `None` where none is remembered."""
        disk = self._disk
        return self._context if disk is None else disk.remembered_context()

    def remember_context(self, text: str) -> str:
        """Remembers a text that chunks are to be precomputed after, unless one is; returns the one that is then.

        The directory keeps it, for this salt and every later process: see `Engine`.

        Raises:
            CacheBlendError: it is no text, or the directory cannot be written.
        """
        check_text("text", text)
        if (disk := self._disk) is not None:
            return disk.remember_context(text)
        with self._lock:
            self._context = text if self._context is None else self._context
            return self._context

    def remove(self, key: str) -> bool:
        """Drops an entry everywhere; returns whether there was one.

        Raises:
            CacheBlendError: the directory cannot be written.
        """
        check_text("key", key)
        there = key in self
        self.check_writable()
        if (disk := self._disk) is not None:
            disk.remove(key)
        with self._lock:  # last, since loads begun until now may have found the entry on disk
            self._loads.outdate(key)
            self._memory.remove(key)
        return there

    def check_writable(self) -> None:
        """Checks that the directory can be written; a store in memory has nothing to check.

        Raises:
            CacheBlendError: it cannot; names the directory.
        """
        if (disk := self._disk) is not None:
            disk.check_writable()

    def clear(self) -> None:
        """Drops every entry, on disk too; errors as `remove`."""
        self.check_writable()
        if (disk := self._disk) is not None:
            disk.clear()
        with self._lock:
            self._loads.outdate()
            self._memory.clear()

    def flush(self) -> None:
        """Waits until every entry put so far has been written to disk, or could not be."""
        if (disk := self._disk) is not None:
            disk.flush()

    def close(self) -> None:
        """Flushes and lets the directory go; the store goes on in memory. Calling it again does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        disk = self._disk
        if disk is not None and not closed:
            disk.stop()
            self._disk_at_close = disk.stats()
            self._disk = None
            disk.close()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> StoreStats:
        """A snapshot of the counts."""
        disk = self._disk
        on_disk = self._disk_at_close if disk is None else disk.stats()
        with self._lock:
            return StoreStats(
                host=self._memory.host.stats(self._hits["host"]),
                device=self._memory.device.stats(self._hits["device"]),
                disk=TierStats(self._hits["disk"], on_disk.entries, on_disk.bytes, on_disk.evicted, on_disk.rejected),
                misses=self._misses,
                stored=self._stored,
                written=on_disk.written,
                dropped=self._dropped,
                unwritable=on_disk.unwritable,
                damaged=on_disk.damaged,
                outdated=on_disk.outdated,
                write_errors=on_disk.write_errors,
                read_errors=on_disk.read_errors,
                skipped=on_disk.skipped,
                queued_bytes=on_disk.queued_bytes,
            )

    def keys(self) -> list[str]:
        """Returns the keys of all entries: first those in memory, in the order of eviction, then those only on disk."""
        with self._lock:
            in_memory = self._memory.keys()
        disk = self._disk
        return list(dict.fromkeys([*in_memory, *([] if disk is None else disk.keys())]))

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each entry, by key: first those on disk, the least recently used first."""
        disk = self._disk
        sizes = {} if disk is None else disk.sizes()
        return sizes | {key: size for key, size in self._memory.sizes().items() if key not in sizes}

    def hold(self, key: str) -> ExitStack | None:
        """Keeps an entry from being evicted until the result is closed; `None` where there is none that can be kept.

        It is kept where it outlives the process, or, where it is in memory only, there. Other processes keep it, too.
        Entries on object storage, and those that are on the device alone, cannot be kept.
        """
        check_text("key", key)
        disk = self._disk
        return self._memory.hold(key) if disk is None else disk.hold(key)

    def same_texts(self, text_digests: Collection[str]) -> list[EntryRecord]:
        """Describes the entries on disk of chunks of these texts, for whatever model and context: see `Label`."""
        disk = self._disk
        return [] if disk is None else disk.disk.same_texts(text_digests)

    def __contains__(self, key: object) -> bool:
        if not is_text(key):
            return False
        with self._lock:
            if self._memory.peek(key) is not None:
                return True
        disk = self._disk
        return disk is not None and key in disk

    def __len__(self) -> int:
        return len(self.keys())

    def _open(self, key: str) -> StoredChunk | None:
        if (chunk := self._memory.open(key)) is not None:
            return chunk
        disk = self._disk
        if disk is not None and (entry := disk.pending(key)) is not None:
            return HostChunk(entry, lambda: None)
        return None if disk is None else disk.open(key)

    def _read(self, key: str, has_room: HasRoom) -> tuple[ChunkEntry, int] | None:
        """Reads an entry from disk, for which there is room, with its uses."""
        disk = self._disk
        loaded = None if disk is None else disk.load(key, has_room)
        return None if loaded is None else (loaded[0].hand_over(), loaded[1])

    def _from_memory(self, load: Load) -> ChunkEntry | None:
        """Returns an entry that is in host memory, on the device, or queued for the disk, and counts a use."""
        key, disk = load.key, self._disk
        with self._lock:
            entry, on_device = self._memory.use(key)
            if entry is not None:
                self._hits["host"] += 1
        if entry is None and on_device is not None:
            entry = on_device.on_host()
            with self._lock:
                self._hits["device"] += 1
                self._keep_loaded(load, entry, self._memory.device.uses(key))
        if entry is None and disk is not None and (entry := disk.pending(key)) is not None:
            with self._lock:
                self._hits["host"] += 1
                self._keep_loaded(load, entry, 1)
        if entry is not None:
            self._touch(key)
        return entry

    def _keep_loaded(self, load: Load, entry: ChunkEntry, uses: int) -> None:
        """Keeps an entry in host memory, unless it has been replaced or removed. The caller holds the lock."""
        entry.hand_over()
        if not load.outdated:
            self._memory.host.put(load.key, entry, uses)

    def _touch(self, key: str) -> None:
        self._memory.count_use(key)
        if (disk := self._disk) is not None:
            disk.touch(key)
