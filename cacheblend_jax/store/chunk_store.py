"""The chunk store: entries by key, on the device, in host memory and on disk, each bounded in bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.device import DeviceChunk, DeviceEntry
from cacheblend_jax.store.entry import ChunkEntry, HostChunk, StoredChunk
from cacheblend_jax.store.loads import Load, Loads
from cacheblend_jax.store.memory import MemoryTier
from cacheblend_jax.store.stats import StoreStats

DEFAULT_HOST_BYTES = 4 * 2**30
DEFAULT_QUEUE_BYTES = 2**30
TOUCHES_KEPT, TOUCHES_SECONDS = 64, 10.0  # uses, and time, that may pass before uses are written to the index


class ChunkStore:
    """Keeps chunk KV in host memory, and in a directory if there is one: written in the background, checked when read.

    Memory and disk are each bounded in bytes. The least recently used entries go first, those seen once before those
    seen twice, one that is in use never. An entry read from the disk is kept in memory too; one that a request found
    in memory or on the disk is copied to the device for the next, where there is room for entries. Safe to use from
    several threads; several processes of a machine may share a directory. Entries are read-only.

    What the file system does never fails a request: an entry that cannot be written stays in memory, one that cannot be
    read (or whose checksums are wrong: it is quarantined then) is a miss. All of it is counted in `stats` and logged
    once.

    Args:
        directory: a path, made if missing; also a URL that Orbax and TensorStore accept (`gs://…`), which then serves
            one writing process. `None`: memory only.
        host_bytes: capacity of host memory.
        disk_bytes: capacity of the directory, with all its files but the index. `None`: 64 GiB, or what is in it where
            that is more: a directory that was given more room does not lose what is there.
        device_bytes: capacity on the device, taken from what the model and its prefills have there; 0: entries go there
            with each request. Engines that stream every layer make no use of it.
        salt: part of every key: stores with different salts share nothing, even over the same chunks.
        queue_bytes: how much may wait to be written. Beyond, entries of requests are kept in memory alone.

    Raises:
        CacheBlendError: a capacity that is not positive; a directory that is a file, cannot be made, or has a backslash
            in its path.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        host_bytes: int = DEFAULT_HOST_BYTES,
        disk_bytes: int | None = None,
        device_bytes: int = 0,
        salt: str = "",
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
    ) -> None:
        for name, value in (("host_bytes", host_bytes), ("disk_bytes", disk_bytes), ("queue_bytes", queue_bytes)):
            if value is None and name == "disk_bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CacheBlendError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(device_bytes, int) or isinstance(device_bytes, bool) or device_bytes < 0:
            raise CacheBlendError(f"device_bytes must be a whole number of at least 0, got {device_bytes!r}")
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.directory: Any = None  # as a path: absolute, or a URL's
        self.salt = salt
        self._host: MemoryTier[ChunkEntry] = MemoryTier(host_bytes)
        self._device: MemoryTier[DeviceEntry] = MemoryTier(device_bytes)
        self._stats = StoreStats()
        self._lock = threading.Lock()
        self._loads = Loads(self._lock)
        self._touched: dict[str, int] = {}
        self._touches, self._touches_written = 0, time.monotonic()
        self._closed = False
        self._disk: Any = None
        self._queue: Any = None
        if directory is not None:
            # TensorStore and Orbax are a quarter of a second to import: a store in memory does without.
            from cacheblend_jax.store.disk import DiskTier
            from cacheblend_jax.store.writeback import WriteBack

            self._disk = DiskTier(directory, disk_bytes)
            self.directory = self._disk.root
            self._queue = WriteBack(self._disk.write, queue_bytes)

    def get(self, key: str) -> ChunkEntry | None:
        """Returns the entry, which is kept in memory from then on, and counts it as seen; `None` where there is none.

        One that is damaged on disk is quarantined and counted, and is `None`.
        """
        with self._loads.begin(key) as load:
            entry = self._from_memory(load)
            if entry is not None:
                return entry
            disk = self._disk
            loaded = None if disk is None else disk.load(key)
            with self._lock:
                if loaded is None:
                    self._stats.misses += 1
                    return None
                entry, uses = loaded
                self._stats.hits += 1
                self._stats.disk_hits += 1
                self._keep_loaded(load, entry, uses + 1)
        self._touch(key)
        return entry

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle that reads the entry layer by layer, for use in a `with`; `None` where there is none.

        Until it is closed, the entry is not evicted from where it is read. One that is read from disk is not copied
        into memory; `promote` does that.
        """
        with self._lock:
            entry = self._host.get(key)  # which is as recently used as one that is on the device too
            if (on_device := self._device.get(key)) is not None:
                self._stats.device_hits += 1
                self._device.pin(key)
            elif entry is not None:
                self._host.pin(key)
            self._stats.hits += on_device is not None or entry is not None
        if on_device is not None:
            self._touch(key)
            return DeviceChunk(on_device, lambda: self._unpin(self._device, key))
        if entry is not None:
            self._touch(key)
            return HostChunk(entry, lambda: self._unpin(self._host, key))
        if (entry := self._pending(key)) is not None:
            self._count("hits")
            self._touch(key)
            return HostChunk(entry, lambda: None)
        disk = self._disk
        chunk = None if disk is None else disk.open(key)
        self._count("misses" if chunk is None else "hits")
        if chunk is not None:
            self._count("disk_hits")
            self._touch(key)
        return chunk

    def promote(self, key: str, to_device: Callable[[ChunkEntry], DeviceEntry] | None = None) -> None:
        """Copies an entry that is on disk alone into memory; counts no use, and does nothing for what is damaged.

        Args:
            to_device: copies an entry to the device; it is kept there too then, where `device_bytes` allow.
        """
        with self._loads.begin(key) as load:
            with self._lock:
                entry, uses = self._host.peek(key), self._host.uses(key)
                if self._device.peek(key) is not None:
                    return
            if entry is None and (disk := self._disk) is not None and (loaded := disk.load(key)) is not None:
                entry, uses = loaded
                with self._lock:
                    self._keep_loaded(load, entry, uses)
            if entry is None or to_device is None or entry.num_bytes > self.device_bytes:
                return
            copy = to_device(entry)
            with self._lock:
                if not load.outdated:
                    self._stats.device_evicted += self._device.put(key, copy, uses) or 0

    def put(self, key: str, entry: ChunkEntry, *, wait: bool = False, uses: int = 1) -> bool:
        """Keeps an entry in memory and queues it for the disk; returns whether it is kept anywhere.

        Args:
            wait: where the queue is full, wait until it is not, instead of leaving the disk out.
            uses: how often the entry counts as seen; 0 for one that no request has asked for yet.
        """
        _read_only(entry)
        with self._lock:
            self._loads.outdate(key)
            self._device.remove(key)
            kept = self._keep(key, entry, uses)
        queued = False
        disk = self._disk
        if disk is not None and disk.writable and not self._closed:
            if uses != 1:
                disk.first_uses[key] = uses
            queued = self._queue.submit(key, entry, wait=wait)
            if not queued:
                disk.first_uses.pop(key, None)
                self._count("dropped")
            with self._lock:  # who looked it up meanwhile may have found the one before on the disk
                self._loads.outdate(key)
                if not kept:
                    self._host.remove(key)
        if kept or queued:
            self._count("stored")
        return kept or queued

    def remove(self, key: str) -> bool:
        """Drops an entry everywhere; returns whether there was one.

        Raises:
            CacheBlendError: the directory cannot be written.
        """
        there = key in self
        self.check_writable()
        if self._disk is not None:
            self._queue.discard({key})
            self._disk.remove([key])
        with self._lock:  # last: what is looked up until then may still be found on disk
            self._loads.outdate(key)
            self._host.remove(key)
            self._device.remove(key)
        return there

    def check_writable(self) -> None:
        """Refuses to go on where the directory cannot be written; a store in memory always can.

        Raises:
            CacheBlendError: names the directory.
        """
        if self._disk is not None:
            self._disk.check_writable()

    def clear(self) -> None:
        """Drops every entry, on disk too; errors as `remove`."""
        self.check_writable()
        if self._disk is not None:
            self._queue.discard()
            self._disk.clear()
        with self._lock:
            self._loads.outdate()
            for key in {*self._host.keys(), *self._device.keys()}:
                self._host.remove(key)
                self._device.remove(key)
            self._touched.clear()

    def flush(self) -> None:
        """Waits until every entry put so far is on the disk, or could not be written."""
        if self._queue is not None:
            self._queue.flush()
            self._write_touches()

    def close(self) -> None:
        """Flushes, and lets the directory go; the store goes on from memory. Once or more."""
        with self._lock:
            closed, self._closed = self._closed, True
        if self._queue is not None and not closed:
            self._queue.close()
            self._write_touches()
            disk, self._disk = self._disk, None
            on_disk = disk.stats()
            with self._lock:
                self._stats = replace(self._with_host(), **on_disk)
            disk.close()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> StoreStats:
        """A snapshot of the counts."""
        disk = self._disk
        on_disk = {} if disk is None else disk.stats()
        with self._lock:
            return replace(self._with_host(), **on_disk)

    def keys(self) -> list[str]:
        """Keys held: first those in memory, in the order in which they would go, then those on disk alone."""
        with self._lock:
            keys = list(dict.fromkeys([*self._host.keys(), *self._device.keys()]))
        if self._disk is not None:
            known = set(keys)
            keys += [key for key in (*sorted(self._queue.keys()), *self._disk.keys()) if key not in known]
        return list(dict.fromkeys(keys))

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        with self._lock:
            if self._host.peek(key) is not None or self._device.peek(key) is not None:
                return True
        disk = self._disk
        return disk is not None and (self._queue.pending(key) is not None or key in disk)

    def __len__(self) -> int:
        return len(self.keys())

    def _from_memory(self, load: Load) -> ChunkEntry | None:
        key = load.key
        with self._lock:
            entry = self._host.get(key)
            on_device = self._device.get(key)
            if entry is not None:
                self._stats.hits += 1
        if entry is None and on_device is not None:
            entry = on_device.on_host()
            with self._lock:
                self._stats.hits += 1
                self._stats.device_hits += 1
                self._keep_loaded(load, entry, self._device.uses(key))
        if entry is None and (entry := self._pending(key)) is not None:
            with self._lock:
                self._stats.hits += 1
                self._keep_loaded(load, entry, 1)
        if entry is not None:
            self._touch(key)
        return entry

    def _pending(self, key: str) -> ChunkEntry | None:
        return None if self._queue is None else self._queue.pending(key)

    def _keep(self, key: str, entry: ChunkEntry, uses: int) -> bool:
        evicted = self._host.put(key, entry, uses)
        if evicted is None:
            self._stats.rejected += 1
            return False
        self._stats.evicted += evicted
        return True

    def _keep_loaded(self, load: Load, entry: ChunkEntry, uses: int) -> None:
        _read_only(entry)
        if not load.outdated:
            self._keep(load.key, entry, uses)

    def _touch(self, key: str) -> None:
        """Counts a use for the disk's order; written in batches, so that a hit never waits for the index."""
        if self._disk is None:
            return
        with self._lock:
            self._touched[key] = self._touched.pop(key, 0) + 1
            self._touches += 1
            due = self._touches >= TOUCHES_KEPT or time.monotonic() - self._touches_written >= TOUCHES_SECONDS
        if due:
            self._queue.run_soon(self._write_touches)

    def _write_touches(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
            self._touches, self._touches_written = 0, time.monotonic()
        disk = self._disk
        if disk is not None:
            disk.touch(touched)

    def _unpin(self, tier: MemoryTier, key: str) -> None:
        with self._lock:
            tier.unpin(key)

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self._stats, what, getattr(self._stats, what) + 1)

    def _with_host(self) -> StoreStats:
        on_device = {"device_entries": len(self._device), "device_bytes": self._device.bytes}
        return replace(self._stats, entries=len(self._host), bytes=self._host.bytes, **on_device)


def _read_only(entry: ChunkEntry) -> ChunkEntry:
    for array in (entry.k, entry.v):
        array.flags.writeable = False
    return entry
