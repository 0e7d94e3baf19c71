"""Makes room on disk: packs are removed whole, never while they are read."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.pins import BusyError, Pin
from cacheblend_jax.store.places import Places

NOT_OURS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)  # of another user's pack; of a file, or of a link


def make_room(places: Places, index: Index, log: DiskLog, capacity: int) -> bool:
    """Evicts packs until the rest fits into so many bytes; returns whether it does. Packs being read stay."""
    sweep(places, index)
    stay: set[str] = set()
    while index.totals()[0] > capacity:
        candidates = [pack for pack in index.candidates(capacity, len(stay)) if pack not in stay]
        if not candidates:
            index.recount()  # every pack left is being read, or the totals were wrong
            break
        for pack in candidates:
            if index.totals()[0] <= capacity:
                return True
            if not _evict(places, index, log, pack):
                stay.add(pack)
    return index.totals()[0] <= capacity


def sweep(places: Places, index: Index) -> None:
    """Removes the files of packs that hold no entries any more and that nobody reads."""
    for pack in index.packs("dead"):
        remove_pack(places, index, pack)


def remove_pack(places: Places, index: Index, pack: str) -> bool:
    """Removes the files of a pack without entries; returns whether it could: nobody reads it, and it is ours."""
    with held_alone(places, pack) as is_free:
        if is_free:
            _remove_files(places, index, pack)
        return is_free


def _evict(places: Places, index: Index, log: DiskLog, pack: str) -> bool:
    """Removes a pack with its entries; returns whether it could: nobody reads it, and it is ours."""
    with held_alone(places, pack) as is_free:
        if is_free:
            log.count("evicted", index.bury(pack))
            _remove_files(places, index, pack)
        return is_free


@contextmanager
def held_alone(places: Places, pack: str) -> Iterator[bool]:
    """Holds a pack alone for the body, if possible: yields whether it may be removed, as nobody else reads it."""
    try:
        pin = Pin(places.pack(pack), alone=True) if places.local else None
    except FileNotFoundError:
        pin = None
    except BusyError:
        yield False
        return
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        yield False
        return
    try:
        # What another user wrote can often be read and held, but not removed.
        yield pin is None or os.access(places.pack(pack), os.W_OK | os.X_OK)
    finally:
        if pin is not None:
            pin.close()


def _remove_files(places: Places, index: Index, pack: str) -> None:
    path = places.pack(pack)
    if places.local:
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()
    if not places.has_pack(pack):
        index.forget_pack(pack, "dead")
