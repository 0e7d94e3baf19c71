"""Packs in use: one descriptor each, however many of its entries are open, and never more than a few descriptors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from etils import epath

from cacheblend_jax.store.pins import BusyError, Pin

MAX_PINNED = 128  # packs, with a descriptor each; processes often may have no more than 1,024 descriptors


class OpenPacks:
    """Keeps packs from being evicted while their entries are in use. Thread-safe.

    A pack is pinned while it is held. Where more than `limit` are held, those not read for longest are unpinned until
    they are read again; such a read fails if the pack has been evicted by then.

    Args:
        limit: how many packs may be pinned at a time, not counting those that are being read right now.
    """

    def __init__(self, limit: int = MAX_PINNED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held: dict[str, _Pack] = {}
        self._pinned: OrderedDict[_Pack, Pin] = OrderedDict()  # the latest read last

    def hold(self, path: epath.Path) -> HeldPack:
        """Pins a pack until the result is closed.

        Raises:
            FileNotFoundError: its files are gone.
            BusyError: it is being evicted.
            OSError: it cannot be opened.
        """
        with self._lock:
            pack = self._held.get(path.name) or _Pack(path)
            self._pin(pack)
            pack.holders += 1
            self._held[path.name] = pack
        return HeldPack(self, pack)

    @contextmanager
    def reading(self, pack: _Pack) -> Iterator[None]:
        """Keeps a pack pinned for the body; see `HeldPack.reading`."""
        with self._lock:
            try:
                self._pin(pack)
            except BusyError as error:
                raise FileNotFoundError(str(error)) from error
            pack.readers += 1
        try:
            yield
        finally:
            with self._lock:
                pack.readers -= 1
                self._unpin_if_unused(pack)
                self._unpin_excess()

    def let_go(self, pack: _Pack) -> None:
        """Ends one hold of a pack."""
        with self._lock:
            pack.holders -= 1
            if not pack.holders:
                self._held.pop(pack.path.name, None)
            self._unpin_if_unused(pack)

    def _pin(self, pack: _Pack) -> None:
        if pack not in self._pinned:
            self._pinned[pack] = Pin(pack.path)
        self._pinned.move_to_end(pack)
        self._unpin_excess()

    def _unpin_excess(self) -> None:
        if len(self._pinned) > self._limit:
            idle = [each for each in self._pinned if not each.readers]
            for each in idle[: max(len(idle) - self._limit, 0)]:
                self._pinned.pop(each).close()

    def _unpin_if_unused(self, pack: _Pack) -> None:
        if not pack.holders and not pack.readers and pack in self._pinned:
            self._pinned.pop(pack).close()


class _Pack:
    """A pack that is held: by how many, and how many reads are under way."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self.holders = self.readers = 0


class HeldPack:
    """A pack that is not evicted before `close`, except as `OpenPacks` says."""

    def __init__(self, packs: OpenPacks, pack: _Pack) -> None:
        self._packs, self._pack = packs, pack
        self._is_closed = False

    def reading(self) -> AbstractContextManager[None]:
        """Keeps the pack pinned for the body.

        Raises:
            FileNotFoundError: it has been evicted since it was pinned last.
            OSError: it cannot be opened.
        """
        return self._packs.reading(self._pack)

    def close(self) -> None:
        """Lets the pack go. Calling it again does nothing."""
        closed, self._is_closed = self._is_closed, True
        if not closed:
            self._packs.let_go(self._pack)
