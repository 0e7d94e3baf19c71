"""Background work, on one thread: computes and stores chunks that requests missed, and promotes slow ones."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from cacheblend_jax.engine.agreement import Alone, Together
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.results import BackgroundStats
from cacheblend_jax.runtime.exit_hook import finished, flush_before_exit
from cacheblend_jax.store import ChunkEntry, DeviceEntry, Store
from cacheblend_jax.store.tiered_memory import shares_of

logger = logging.getLogger(__name__)
MAX_PENDING = 256  # chunks that may wait to be computed and stored, and that may wait to be promoted


class Background:
    """Stores and promotes chunks for an engine. A clean exit of the process waits for it.

    Args:
        store: where chunks go.
        standalone: computes a chunk's stand-alone KV.
        to_device: copies an entry to the device, where the store keeps entries there.
        agreement: what all hosts decide together. On several, chunks are computed in the thread that asks for them, for
            each host to run the same programs in the same order.
    """

    def __init__(
        self,
        store: Store,
        standalone: Callable[[PlacedChunk], ChunkEntry],
        to_device: Callable[[ChunkEntry], DeviceEntry] | None,
        agreement: Alone | Together | None = None,
    ) -> None:
        self._store, self._standalone, self._to_device = store, standalone, to_device
        self._agreement = Alone() if agreement is None else agreement
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cacheblend-store")
        self._pending: dict[str, Future] = {}  # in the order in which they are computed
        self._promoting: set[str] = set()
        self._queueing = threading.Lock()  # guards what is added to both, and what leaves `_pending`
        self._counts: Counter[str] = Counter()  # by the names of `BackgroundStats`
        self._counting = threading.Lock()
        flush_before_exit(self)

    def store_later(self, chunk: PlacedChunk, *, again: bool = False) -> None:
        """Computes and stores a chunk that the store lacks, or, with `again`, one that it has but cannot read."""
        if not self._agreement.is_alone:
            self._store_now(chunk, again)
            return

        def work() -> None:
            try:
                if again or chunk.key not in self._store:
                    self._store.put(chunk.key, self._standalone(chunk))
            except Exception:  # costs a later request its hit, never an answer
                self._failed_to_store(chunk)
            finally:
                with self._queueing:  # whoever submitted it has added it by then
                    self._pending.pop(chunk.key, None)

        with self._queueing:
            if chunk.key in self._pending:
                return
            if len(self._pending) >= MAX_PENDING:
                self._count("dropped", "chunks are not stored: %d wait to be computed", MAX_PENDING)
                return
            try:
                self._pending[chunk.key] = self._thread.submit(work)
            except RuntimeError as error:  # closed, or no thread can be started; the task may still have been queued
                self._count("dropped", "chunks are not stored: %s", error)

    def _store_now(self, chunk: PlacedChunk, again: bool) -> None:
        """Computes a chunk with all hosts, which fail in the same call where one cannot, and stores it."""
        with self._agreement.request():
            entry = self._standalone(chunk)
            self._agreement.meet("a prefill's storing")
        try:
            if self._agreement.writes and (again or chunk.key not in self._store):
                self._store.put(chunk.key, entry)
        except Exception:  # of this host alone: costs a later request its hit, never an answer
            self._failed_to_store(chunk)

    def _failed_to_store(self, chunk: PlacedChunk) -> None:
        logger.exception("a chunk of %d tokens could not be stored", chunk.num_tokens)
        self._count("failed")

    def promote_later(self, key: str, num_bytes: int) -> None:
        """Copies a chunk of `num_bytes` into a faster tier than it was read from, for later requests."""

        on_device = self._store.device_bytes * shares_of(self._to_device) if self._to_device else 0
        if num_bytes > max(self._store.host_bytes, on_device):
            return

        def work() -> None:
            try:
                self._store.promote(key, self._to_device)
            except Exception:  # costs a later request time, never an answer
                logger.exception("a chunk could not be promoted to a faster tier")
                self._count("failed")
            finally:
                self._promoting.discard(key)

        with self._queueing:
            if key in self._promoting:
                return
            if len(self._promoting) >= MAX_PENDING:
                self._count("not_promoted")
                return
            self._promoting.add(key)
            try:
                self._thread.submit(work)
            except RuntimeError:  # closed, or no thread can be started
                self._promoting.discard(key)
                self._count("not_promoted")

    @property
    def stats(self) -> BackgroundStats:
        """A snapshot of the counts."""
        with self._counting:
            return BackgroundStats(**self._counts)

    def _count(self, what: str, message: str = "", *args: object) -> None:
        """Counts what happened, and logs the message the first time."""
        with self._counting:
            self._counts[what] += 1
            is_first = self._counts[what] == 1
        if message and is_first:
            logger.warning(message, *args)

    def next_of(self, keys: Sequence[str]) -> list[Future]:
        """Returns those of the chunks that are at the head of the queue: what a prefill that wants them waits for.

        It does not wait for a chunk queued behind those of other requests: computing it anew is faster.
        """
        ours = set(keys)
        waiting = list(self._pending.items()) if ours & self._pending.keys() else []
        return [future for _, future in itertools.takewhile(lambda each: each[0] in ours, waiting)]

    def wait_for(self, keys: Sequence[str]) -> None:
        """Waits for those of the chunks that are queued to be stored."""
        wait([future for key in keys if (future := self._pending.get(key)) is not None])

    def flush(self) -> None:
        """Waits until this host's work is done, and written to disk where the store has a directory."""
        self.wait_for(list(self._pending))
        with suppress(RuntimeError):  # closed: nothing is left to wait for
            self._thread.submit(lambda: None).result()  # one thread: everything queued earlier is then done
        self._store.flush()

    def flush_on_all(self) -> None:
        """Waits until all hosts' work is done and written.

        Not at exit: a host that has failed is not to wait for the others.
        """
        with self._agreement.request():
            self.flush()
            self._agreement.meet("flush")

    def close(self) -> None:
        """Finishes the queued work and accepts no more."""
        self._thread.shutdown(wait=True)
        self._store.flush()
        finished(self)
