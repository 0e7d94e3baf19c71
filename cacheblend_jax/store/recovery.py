"""Opening a directory: what killed writers left is tidied up, and an index that is lost is made from the packs."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import uuid
from typing import TYPE_CHECKING

from cacheblend_jax.store import quarantine
from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.index import INDEX_ERRORS, Index
from cacheblend_jax.store.pack import read_contents, size_of
from cacheblend_jax.store.pins import BusyError, Pin
from cacheblend_jax.store.record import DamagedRecordError, OtherVersionError

if TYPE_CHECKING:
    from cacheblend_jax.store.disk import DiskTier

logger = logging.getLogger(__name__)
INDEX_FILE = "index.sqlite"


def open_index(disk: DiskTier) -> Index:
    """Opens a directory's index, or makes it; tidies up first what killed processes left."""
    path = os.path.abspath(disk.root / INDEX_FILE)
    if disk.local and disk.writable:
        try:
            return _tidied(disk, Index(path))
        except sqlite3.OperationalError as error:  # no permission, no room
            disk.writable = False
            disk.say_once(f"store {disk.root}: entries are read, and not written: {error}", "write_errors")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            disk.say_once(f"store {disk.root}: the index is made anew: {error}", "damaged")
            return new_index(disk, path)
    if disk.local and os.path.exists(path):
        for how in ("mode=ro", "mode=ro&immutable=1"):
            try:
                return Index(path, how)
            except INDEX_ERRORS:
                continue
    disk.index = Index(None)
    adopt_all(disk)
    return disk.index


def _tidied(disk: DiskTier, index: Index) -> Index:
    disk.index = index
    try:
        recover(disk)
        if index.fresh:
            adopt_all(disk)
    except BaseException:
        index.close()
        raise
    return index


def new_index(disk: DiskTier, path: str) -> Index:
    """Moves a broken index aside and makes one from the packs."""
    kept = disk.root / "quarantine" / f"index-{uuid.uuid4().hex}"
    kept.mkdir()
    for suffix in ("-wal", "-shm", ""):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, kept / (INDEX_FILE + suffix))
    disk.index = Index(path)
    recover(disk)
    adopt_all(disk)
    quarantine.bound(disk)
    return disk.index


def recover(disk: DiskTier) -> None:
    """Removes what killed writers left: places of writing, reservations, files of dead packs."""
    for outer in (disk.root / "writing").iterdir():
        try:
            with Pin(outer, alone=True):
                shutil.rmtree(outer, ignore_errors=True)
        except (BusyError, FileNotFoundError, NotADirectoryError):
            continue
    for pack in disk.index.packs("writing"):
        if (disk.root / "writing" / pack).exists():
            continue
        if disk.pack_path(pack).exists():  # killed between rename and index: nothing is lost
            adopt(disk, pack)
        disk.index.forget_pack(pack, "writing")
    sweep(disk)


def adopt_all(disk: DiskTier) -> int:
    """Enters packs in the index that it does not know; returns how many entries they hold."""
    known = {pack for state in ("ready", "writing", "dead") for pack in disk.index.packs(state)}
    packs = sorted(path.name for path in (disk.root / "packs").iterdir()) if (disk.root / "packs").exists() else []
    return sum(adopt(disk, pack) for pack in packs if pack not in known)


def adopt(disk: DiskTier, pack: str) -> int:
    """Enters a pack in the index from its own `entries.json`; returns how many entries it holds."""
    path = disk.pack_path(pack)
    try:
        records = read_contents(path).records
        return disk.index.add(pack, size_of(path), records, replace=False)
    except OtherVersionError as error:
        disk.say_once(f"store {disk.root}: pack {pack} is of {error}; its entries count as missing", "outdated")
    except (DamagedRecordError, OSError) as error:
        if not disk.local and isinstance(error, FileNotFoundError):  # its writer is at it, or died at it
            return 0
        logger.warning("store %s: pack %s is not used: %s", disk.root, pack, error)
        disk.count("damaged")
        if disk.writable and disk.local:
            path.rename(disk.root / "quarantine" / pack)
    return 0
