"""Making room on disk: packs go as wholes, never one that is in use, and their files with them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from cacheblend_jax.store.pins import BusyError, Pin

if TYPE_CHECKING:
    from cacheblend_jax.store.disk import DiskTier


def make_room(disk: DiskTier, capacity: int | None = None) -> bool:
    """Evicts packs until all fit into the capacity; returns whether they do (those in use stay)."""
    capacity = disk.capacity if capacity is None else capacity
    sweep(disk)
    while disk.index.totals()[0] > capacity:
        progress = False
        for pack in disk.index.candidates(capacity):
            if disk.index.totals()[0] <= capacity:
                return True
            if remove_pack(disk, pack, evict=True):
                progress = True
        if not progress:
            disk.index.recount()  # all that is left is in use; or the totals were wrong
            break
    return disk.index.totals()[0] <= capacity


def sweep(disk: DiskTier) -> None:
    """Removes the files of packs that hold no entry any more and that nobody reads."""
    for pack in disk.index.packs("dead"):
        remove_pack(disk, pack)


def remove_pack(disk: DiskTier, pack: str, *, evict: bool = False) -> bool:
    """Removes a pack's files, and to `evict` it its entries before; returns whether nobody reads it."""
    try:
        pin = Pin(disk.pack_path(pack), alone=True) if disk.local else None
    except (BusyError, PermissionError):  # read by others, or another user's
        return False
    except FileNotFoundError:
        pin = None
    if evict:
        disk.count("evicted", disk.index.bury(pack))
    _remove_files(disk, pack)
    if pin is not None:
        pin.close()
    return True


def _remove_files(disk: DiskTier, pack: str) -> None:
    path = disk.pack_path(pack)
    if disk.local:
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()
    if not path.exists():
        disk.index.forget_pack(pack, "dead")
