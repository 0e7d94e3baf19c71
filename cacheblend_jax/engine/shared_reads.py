"""Entries that several prefills share: each stays open, and its layers in memory, until the last of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Protocol, runtime_checkable

from cacheblend_jax.store import StoredChunk, is_slow
from cacheblend_jax.store.stored_chunk import StoredRows
from cacheblend_jax.store.wrapped import WrappedChunk

MOST_KEPT = 256  # each may hold a descriptor; processes often may have no more than 1,024


@runtime_checkable
class Opens(Protocol):
    """The part of a `Store` that a prefill reads from."""

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle on an entry; `None` where there is none."""


class SharedReads:
    """Opens entries for several prefills, and keeps open those that a later one wants, too.

    Layers of a slow tier stay in host memory as long, so that the next prefill with the same chunk finds them there; or
    waits for them, where another thread is reading them for its own.

    Args:
        wanted: how often each key is going to be opened.
    """

    def __init__(self, store: Opens, wanted: Mapping[str, int]) -> None:
        self._store, self._left = store, Counter(wanted)
        self._kept: dict[str, _KeptChunk] = {}
        self._lock = threading.RLock()

    def open(self, key: str) -> StoredChunk | None:
        """See `Store.open`; an entry that could not be read is opened anew."""
        with self._lock:
            self._left[key] -= 1
            kept = self._kept.get(key)
            if kept is None or kept.has_failed:
                stored = self._store.open(key)
                if stored is None:
                    return None
                kept = self._kept[key] = _KeptChunk(stored, partial(self._closed, key))
            kept.users += 1
            kept.keeps_layers = self._left[key] > 0 or kept.users > 1
            return kept

    def _closed(self, key: str, chunk: _KeptChunk) -> None:
        with self._lock:
            chunk.users -= 1
            if chunk.users:
                return
            chunk.settle_tier()
            if self._left[key] <= 0 or chunk.has_failed or len(self._kept) > MOST_KEPT:
                if self._kept.get(key) is chunk:
                    del self._kept[key]
                chunk.wrapped.close()

    def __enter__(self) -> SharedReads:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for kept in self._kept.values():
            kept.wrapped.close()


class _KeptChunk(WrappedChunk):
    """A `StoredChunk` that several use; it keeps the layers it has read from a slow tier while others will want them.

    Args:
        closed: called with it when one of its users has closed it.
    """

    def __init__(self, stored: StoredChunk, closed: Callable[[_KeptChunk], None]) -> None:
        super().__init__(stored)
        self._closed = closed
        self._layers: dict[tuple[int, range | None], Future[tuple[StoredRows, StoredRows]]] = {}
        self._lock = threading.Lock()
        self.users = 0
        self.keeps_layers = self.has_failed = False

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        with self._lock:
            known = self._layers.get((layer, heads))
            if known is None:
                read: Future[tuple[StoredRows, StoredRows]] = Future()
                if self.keeps_layers and is_slow(self.wrapped.tier):
                    self._layers[layer, heads] = read
        if known is not None:
            return known.result()
        try:
            read.set_result(super().read_layer(layer, heads))
        except BaseException as error:  # whatever it is, others may be waiting
            self.has_failed = True
            read.set_exception(error)
        self.settle_tier()
        return read.result()

    def settle_tier(self) -> None:
        """Counts the entry as one in host memory, if all layers are there, and no other prefill relies on its tier."""
        with self._lock:
            there = Counter(heads for (_, heads), read in self._layers.items() if read.done())
            if self.users <= 1 and self.num_layers in there.values():
                self.tier = "host"

    def close(self) -> None:
        """Closes the entry, unless others use it or will."""
        self._closed(self)
