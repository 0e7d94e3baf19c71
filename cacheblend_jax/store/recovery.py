"""Opening a directory: what killed writers left is tidied up, and an index that is lost is made from the packs."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING

from cacheblend_jax.store import quarantine
from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.index_file import INDEX_ERRORS, identity_of
from cacheblend_jax.store.location import PACK_NAME
from cacheblend_jax.store.pack import read_contents, size_of
from cacheblend_jax.store.pins import BusyError, Pin, held
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
            return _open_to_write(disk, path)
        except (OSError, *INDEX_ERRORS) as error:  # no permission, no room
            disk.writable = False
            disk.say_once(f"store {disk.root}: entries are read, and not written: {error}", "write_errors")
    if disk.local and os.path.exists(path):
        try:
            return Index(path, read_only=True)
        except (OSError, *INDEX_ERRORS):
            pass
    disk.index = Index(None)
    adopt_all(disk)
    return disk.index


def is_replaced(disk: DiskTier) -> bool:
    """Whether another process found our index broken, moved it away and made a new one."""
    ours = disk.index.identity
    return ours is not None and identity_of(os.path.abspath(disk.root / INDEX_FILE)) not in (None, ours)


def _open_to_write(disk: DiskTier, path: str) -> Index:
    """Opens the index, and makes it from the packs where it is new; one that is broken is moved aside first."""
    for attempt in (1, 2):
        found = None
        try:
            with held(disk.root):  # so that nobody moves it away while it is being opened
                found = identity_of(path)
                index = Index(path)
            return _tidied(disk, index)
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if attempt == 2:
                raise
            disk.say_once(f"store {disk.root}: the index is made anew: {error}", "damaged")
            set_index_aside(disk, found)
    raise AssertionError("unreachable")


def _tidied(disk: DiskTier, index: Index) -> Index:
    disk.index = index
    try:
        recover(disk)
        if not index.is_complete() and adopt_all(disk):  # it is new, or who made it was killed at it
            index.mark_complete()
    except BaseException:
        index.close()
        raise
    return index


def set_index_aside(disk: DiskTier, broken: tuple[int, int] | None) -> None:
    """Moves the index to the quarantine, if it still is the one that was found broken and not its successor."""
    path = os.path.abspath(disk.root / INDEX_FILE)
    with held(disk.root, alone=True):
        if broken is None or identity_of(path) != broken:
            return
        kept = disk.root / "quarantine" / f"index-{uuid.uuid4().hex}"
        kept.mkdir(parents=True)
        for suffix in ("-wal", "-shm", ""):
            if os.path.exists(path + suffix):
                os.rename(path + suffix, kept / (INDEX_FILE + suffix))
    quarantine.bound(disk)


def recover(disk: DiskTier) -> None:
    """Removes what killed writers left: places of writing, reservations, files of dead packs."""
    for outer in (disk.root / "writing").iterdir():
        try:
            with Pin(outer, alone=True):
                shutil.rmtree(outer, ignore_errors=True)
        except (BusyError, OSError):  # such as another user's, which is theirs to remove
            continue
    for pack in disk.index.packs("writing"):
        if (disk.root / "writing" / pack).exists():
            continue
        # Killed between rename and index: nothing is lost.
        if not disk.pack_path(pack).exists() or adopt(disk, pack):
            disk.index.forget_pack(pack, "writing")
    sweep(disk)


def unknown_packs(disk: DiskTier) -> list[str]:
    """Returns the packs that the index does not know."""
    if not (disk.root / "packs").exists():
        return []
    present = [path.name for path in (disk.root / "packs").iterdir() if PACK_NAME.fullmatch(path.name)]
    # Asked after listing: the index knows a pack before it appears, and until its files are gone.
    known = {pack for state in ("ready", "writing", "dead") for pack in disk.index.packs(state)}
    return sorted(pack for pack in present if pack not in known and disk.pack_path(pack).exists())


def adopt_all(disk: DiskTier) -> bool:
    """Enters packs in the index that it does not know; returns whether all could be read. Again does no harm."""
    unread = [pack for pack in unknown_packs(disk) if not adopt(disk, pack)]
    return not unread


def adopt(disk: DiskTier, pack: str) -> bool:
    """Enters a pack in the index from its own `entries.json`; returns whether it could be read, for better or worse."""
    path = disk.pack_path(pack)
    try:
        with Pin(path) if disk.local else nullcontext():  # nobody evicts it meanwhile
            records = read_contents(path).records
            disk.index.add(pack, size_of(path), records, adopt=True)
    except BusyError:  # being evicted
        return False
    except OtherVersionError as error:
        disk.say_once(f"store {disk.root}: pack {pack} is of {error}; its entries count as missing", "outdated")
    except (DamagedRecordError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not disk.local and isinstance(error, FileNotFoundError):  # its writer is at it, or died at it
            return True
        if not path.exists():  # another process took it away
            return True
        logger.warning("store %s: pack %s is not used: %s", disk.root, pack, error)
        disk.count("damaged")
        if disk.writable and disk.local:
            quarantine.set_aside(disk, pack)
    except OSError as error:  # which says nothing about the pack
        disk.say_once(f"store {disk.root}: pack {pack} cannot be read now: {error}", "read_errors")
        return False
    return True
