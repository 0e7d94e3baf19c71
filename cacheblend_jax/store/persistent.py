"""The disk tier as a store uses it: writes are queued, and uses are counted in batches, off the critical path."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from etils import epath

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.disk_chunk import DiskChunk, whole
from cacheblend_jax.store.entry import ChunkEntry, QueuedEntry
from cacheblend_jax.store.marker import remember_context, remembered_context
from cacheblend_jax.store.record import checksums_of
from cacheblend_jax.store.stats import DiskStats
from cacheblend_jax.store.writeback import WriteBack

MAX_UNWRITTEN_USES, MAX_UNWRITTEN_SECONDS = 64, 10.0  # before the uses are written to the index


class PersistentTier:
    """A directory of entries, and the queue of those to be written there. Safe to use from several threads.

    Args:
        directory, capacity, salt: see `DiskTier`.
        queue_bytes: how much may wait to be written.

    Attributes:
        disk, queue: its two parts.

    Raises:
        CacheBlendError: as `DiskTier`.
    """

    def __init__(self, directory: str | os.PathLike[str], capacity: int | None, queue_bytes: int, salt: str) -> None:
        self.disk = DiskTier(directory, capacity, salt)
        self.queue = WriteBack(self.disk.write, queue_bytes)
        self._uses = UnwrittenUses()

    @property
    def root(self) -> epath.Path:
        """The directory: an absolute path, or a URL."""
        return self.disk.places.root

    @property
    def writable(self) -> bool:
        """Whether this process may write in the directory."""
        return self.disk.writable

    def submit(self, queued: QueuedEntry, *, wait: bool) -> bool:
        """Queues an entry to be written; returns false where the queue is full, unless it is to `wait` for room.

        The checksums are those of the arrays now: should anything change them before they are written, that is damage.
        """
        return self.queue.submit(replace(queued, checksums=checksums_of(queued.entry)), wait=wait)

    def pending(self, key: str) -> ChunkEntry | None:
        """Returns an entry that has not been written yet."""
        return self.queue.pending(key)

    @property
    def is_readable(self) -> bool:
        """Whether entries are read, or count as missing because reading has failed repeatedly."""
        return self.disk.health.is_good

    def open(self, key: str) -> DiskChunk | None:
        """See `DiskTier.open`. Of a directory whose reads fail, now and then an entry is read to see if they still do.

        No caller waits for that.
        """
        if self.is_readable:
            return self.disk.open(key)
        if self.disk.health.skipped():
            self.queue.run_soon("probe", lambda: self._probe(key))
        return None

    def load(self, key: str, wanted: Callable[[int], bool] = lambda _: True) -> tuple[ChunkEntry, int] | None:
        """Returns an entry, and how often it has been used; `None` as `open`, and for one that cannot be read.

        Args:
            wanted: says whether an entry of so many bytes is to be read.
        """
        chunk = self.open(key)
        if chunk is not None and not wanted(chunk.num_bytes):
            chunk.close()
            return None
        return None if chunk is None else whole(chunk)

    def touch(self, key: str) -> None:
        """Counts a use of an entry, for the order of eviction. Never waits for the index."""
        if self._uses.add(key):
            self.queue.run_soon("uses", self._write_uses)

    def renew(self, keys: Collection[str]) -> None:
        """Has entries go as if they had just been written, in this order. Waits for the index."""
        for key in keys:
            self._uses.add(key, 0)
        self._write_uses()

    def count_unwritable(self) -> None:
        """See `DiskTier.count_unwritable`."""
        self.disk.count_unwritable()

    def check_writable(self) -> None:
        """See `DiskTier.check_writable`."""
        self.disk.check_writable()

    def remembered_context(self) -> str | None:
        """Returns the context that the directory remembers for the salt; see `Store.remembered_context`."""
        return remembered_context(self.disk.places, self.disk.salt)

    def remember_context(self, text: str) -> str:
        """See `Store.remember_context`. Errors also as `check_writable`."""
        self.check_writable()
        return remember_context(self.disk.places, self.disk.salt, text)

    def remove(self, key: str) -> None:
        """Removes an entry, written or not. Errors as `check_writable`."""
        self.queue.discard({key})
        with self._removing():
            self.disk.remove([key])

    def clear(self) -> None:
        """Removes every entry, written or not. Errors as `check_writable`."""
        self.queue.discard()
        with self._removing():
            self.disk.clear()
        self._uses.take()

    @contextmanager
    def _removing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = reason_and_remedy(error, "try again once it can be reached")
            raise CacheBlendError(
                f"store {str(self.disk.places.root)!r}: entries cannot be removed: {reason}"
            ) from error

    def flush(self) -> None:
        """Waits until every entry submitted so far has been written, or could not be; writes the uses too."""
        self.queue.flush()
        self._write_uses()

    def stop(self) -> None:
        """Flushes, and takes no more entries; reading goes on until `close`."""
        self.queue.close()
        self._write_uses()

    def close(self) -> None:
        """Closes the index, after `stop`."""
        self.disk.close()

    def stats(self) -> DiskStats:
        """See `DiskTier.stats`; with what waits to be written."""
        return replace(self.disk.stats(), queued_bytes=self.queue.num_bytes)

    def hold(self, key: str) -> ExitStack | None:
        """Keeps an entry from being evicted until the result is closed; `None` where it is not in a local directory.

        One that waits to be written is written first.
        """
        if self.pending(key) is not None:
            self.queue.flush()
        chunk = self.disk.open(key)
        if chunk is None:
            return None
        with ExitStack() as held, suppress(OSError):  # it is evicted just now, say
            if chunk.keep(held):
                return held.pop_all()
        return None

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each entry, by key: first those on disk, the least recently used first."""
        waiting = self.queue.sizes()  # asked for first: an entry is in one of the two
        return self.disk.sizes() | waiting

    def keys(self) -> list[str]:
        """Returns the keys of all entries: those not written yet, then the others, the least recently used first."""
        return list(dict.fromkeys([*sorted(self.queue.sizes()), *self.disk.keys()]))

    def __contains__(self, key: str) -> bool:
        return self.pending(key) is not None or (self.is_readable and key in self.disk)

    def _probe(self, key: str) -> None:
        """Reads an entry, or the one used last where there is no such entry: that says whether reads succeed again."""
        known = key if key in self.disk else next(reversed(self.disk.keys()), None)
        if known is not None:
            self.disk.load(known)

    def _write_uses(self) -> None:
        self.disk.touch(self._uses.take())


class UnwrittenUses:
    """Uses of entries that the index does not know of yet, by key. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, int] = {}  # the latest used last
        self._total, self._written_at = 0, time.monotonic()

    def add(self, key: str, number: int = 1) -> bool:
        """Counts uses, the latest of all; returns whether it is time to write them."""
        with self._lock:
            self._uses[key] = self._uses.pop(key, 0) + number
            self._total += number
            return self._total >= MAX_UNWRITTEN_USES or time.monotonic() - self._written_at >= MAX_UNWRITTEN_SECONDS

    def take(self) -> dict[str, int]:
        """Returns the uses, and starts anew."""
        with self._lock:
            uses, self._uses = self._uses, {}
            self._total, self._written_at = 0, time.monotonic()
            return uses
