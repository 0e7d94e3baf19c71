"""Writes entries to disk off the critical path: a bounded queue, and a thread that empties it in batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from cacheblend_jax.runtime.exit_hook import finished, flush_before_exit
from cacheblend_jax.store.entry import ChunkEntry, QueuedEntry

logger = logging.getLogger(__name__)
BATCH_ENTRIES = 64
BATCH_BYTES = 2**28
LINGER_SECONDS = 0.05  # waits for more entries, since small ones share a pack
IDLE_SECONDS = 5.0  # after which the thread ends; the next entry starts another


class WriteBack:
    """A queue of entries to write. They stay readable here until they have been written, or could not be.

    Args:
        write: writes a batch; called by one thread at a time. Where it raises, that is logged and the batch dropped.
        capacity: bytes that may wait.
    """

    def __init__(self, write: Callable[[Sequence[QueuedEntry]], None], capacity: int) -> None:
        self._write = write
        self._capacity = capacity
        self._waiting: dict[str, QueuedEntry] = {}
        self._in_work: dict[str, QueuedEntry] = {}
        self._bytes = 0
        self._changed = threading.Condition()
        self._hurry = 0
        self._closed = False
        self._chores: dict[str, Callable[[], object]] = {}
        self._thread: threading.Thread | None = None
        self._thread_refused = False

    def submit(self, queued: QueuedEntry, *, wait: bool) -> bool:
        """Queues an entry, in place of one of the same key; returns whether it did.

        Args:
            wait: where the queue is full, wait for room instead of returning false.
        """
        num_bytes = queued.entry.num_bytes
        with self._changed:

            def has_room() -> bool:
                return self._closed or not self._bytes or self._bytes + num_bytes <= self._capacity

            if not has_room():
                if not wait:
                    return False
                self._wait_hurrying(has_room)
            if self._closed or not self._wake():
                return False
            old = self._waiting.pop(queued.key, None)
            self._bytes += num_bytes - (0 if old is None else old.entry.num_bytes)
            self._waiting[queued.key] = queued
            return True

    def run_soon(self, name: str, chore: Callable[[], object]) -> None:
        """Calls `chore` on the writing thread; of several of a name, only the latest. What it raises is logged."""
        with self._changed:
            if not self._closed:
                self._chores[name] = chore
                self._wake()

    def _wake(self) -> bool:
        """Wakes the thread, or starts one; returns whether there is one now."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="cacheblend-write", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process may have no more threads
                if not self._thread_refused:
                    logger.warning("entries are not written for want of a thread: %s", error)
                self._thread_refused = True
                return False
            self._thread = thread
            flush_before_exit(self)
        self._changed.notify_all()
        return True

    def pending(self, key: str) -> ChunkEntry | None:
        """Returns an entry that has not been written yet."""
        with self._changed:
            queued = self._waiting.get(key) or self._in_work.get(key)
            return None if queued is None else queued.entry

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each entry that has not been written yet, by key, in the order of writing."""
        with self._changed:
            return {key: queued.entry.num_bytes for key, queued in (self._in_work | self._waiting).items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries that have not been written yet."""
        with self._changed:
            return self._bytes

    def discard(self, keys: set[str] | None = None) -> None:
        """Takes entries, or all of them, out of the queue; waits for those that are being written."""
        with self._changed:
            for key in set(self._waiting) if keys is None else keys & self._waiting.keys():
                self._bytes -= self._waiting.pop(key).entry.num_bytes
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._in_work if keys is None else keys & self._in_work.keys()))

    def flush(self) -> None:
        """Waits until everything queued so far has been written, or could not be."""
        with self._changed:
            unwritten = [*self._waiting.values(), *self._in_work.values()]
            self._wait_hurrying(lambda: not any(self._holds(queued) for queued in unwritten))

    def close(self) -> None:
        """Flushes and stops the thread."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        finished(self)

    def _wait_hurrying(self, until: Callable[[], bool]) -> None:
        """Waits, and has the thread not wait for more entries meanwhile. The caller holds the lock."""
        self._hurry += 1
        try:
            self._changed.notify_all()
            self._changed.wait_for(until)
        finally:
            self._hurry -= 1

    def _holds(self, queued: QueuedEntry) -> bool:
        return self._waiting.get(queued.key) is queued or self._in_work.get(queued.key) is queued

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._chores or self._closed, timeout=IDLE_SECONDS)
                chores, self._chores = self._chores, {}
                if not self._waiting and not chores:  # an idle thread would keep an abandoned store alive
                    self._thread = None
                    return
                if self._waiting:
                    self._changed.wait_for(self._is_due, timeout=LINGER_SECONDS)
                self._in_work = self._next_batch()
            for name, chore in chores.items():
                try:
                    chore()
                except Exception:
                    logger.exception("%s: failed", name)
            try:
                if self._in_work:
                    self._write(list(self._in_work.values()))
            except Exception:  # costs a later process its hits, never an answer
                logger.exception("%d entries could not be written", len(self._in_work))
            with self._changed:
                self._bytes -= sum(queued.entry.num_bytes for queued in self._in_work.values())
                self._in_work = {}
                self._changed.notify_all()

    def _is_due(self) -> bool:
        waiting = sum(queued.entry.num_bytes for queued in self._waiting.values())
        return bool(self._hurry or self._closed or len(self._waiting) >= BATCH_ENTRIES or waiting >= BATCH_BYTES)

    def _next_batch(self) -> dict[str, QueuedEntry]:
        batch: dict[str, QueuedEntry] = {}
        size = 0
        for key, queued in list(self._waiting.items()):
            if batch and (len(batch) == BATCH_ENTRIES or size + queued.entry.num_bytes > BATCH_BYTES):
                break
            batch[key] = self._waiting.pop(key)
            size += queued.entry.num_bytes
        return batch
