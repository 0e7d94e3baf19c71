"""Opens a directory's index: tidies up after killed writers, and makes an index that is lost from the packs."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import nullcontext
from dataclasses import replace

from cacheblend_jax.store import quarantine
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.index_file import INDEX_ERRORS, identity_of, is_broken, is_foreign, is_regular
from cacheblend_jax.store.pack import read_contents, size_of
from cacheblend_jax.store.pins import BusyError, Pin, held
from cacheblend_jax.store.places import INDEX_NAME, PACK_NAME, WRITING_NAME, Places
from cacheblend_jax.store.record import DamagedRecordError, OtherVersionError
from cacheblend_jax.store.space import forget_removed, with_space


def open_index(places: Places, log: DiskLog) -> tuple[Index, Places]:
    """Opens a directory's index, or makes one; tidies up after killed writers first, where it may.

    Returns:
        The index, in memory for a directory that can hold none, and the places: no longer writable where the index
        turned out not to be.
    """
    if places.local and places.writable:
        try:
            index, removed = with_space(places, None, log, lambda: _open_to_write(places, log))
            forget_removed(index, log, removed)
            return index, places
        except (OSError, *INDEX_ERRORS) as error:  # no permission, no room
            places = replace(places, writable=False)
            log.warn_once(f"entries are read, but not written: {error}", "write_errors")
    if places.local and is_regular(places.index):
        try:
            return Index(places.index, read_only=True), places
        except (OSError, *INDEX_ERRORS):
            pass
    index = Index(None)
    adopt_all(places, index, log)
    return index, places


def is_replaced(places: Places, index: Index) -> bool:
    """Whether our index is not the directory's any more: another process has made it anew, or somebody removed it."""
    return index.identity is not None and identity_of(places.index) != index.identity


def _open_to_write(places: Places, log: DiskLog) -> Index:
    """Opens the index; moves a broken one aside first, and fills a new one from the packs."""
    if not is_regular(places.index):
        set_index_aside(places, identity_of(places.index))
    broken = None
    try:
        with held(places.root):  # so that no other process moves the file away meanwhile
            broken = identity_of(places.index)
            index = Index(places.index)
        return _tidied(places, index, log)
    except INDEX_ERRORS as error:
        if not is_broken(error):
            raise
        log.warn_once(f"the index is made anew: {error}", "damaged")
        set_index_aside(places, broken)
    with held(places.root):
        index = Index(places.index)
    return _tidied(places, index, log)


def _tidied(places: Places, index: Index, log: DiskLog) -> Index:
    try:
        tidy_up(places, index, log)
        if not index.is_complete() and adopt_all(places, index, log):  # new, or its maker was killed while filling it
            index.mark_complete()
    except BaseException:
        index.close()
        raise
    return index


def set_index_aside(places: Places, broken: tuple[int, int] | None) -> None:
    """Moves the index to the quarantine, unless another process has already replaced the `broken` one.

    Args:
        broken: the identity of the file that was found broken; `None` where there was none.
    """
    with held(places.root, alone=True):
        if broken is None or identity_of(places.index) != broken:
            return
        # The quarantine is emptied in time, but not of what is somebody else's.
        kept = places.quarantine / f"{'foreign' if is_foreign(places.index) else 'index'}-{uuid.uuid4().hex}"
        kept.mkdir(parents=True)
        for suffix in ("-wal", "-shm", ""):
            if os.path.lexists(places.index + suffix):
                os.rename(places.index + suffix, kept / (INDEX_NAME + suffix))
    quarantine.remove_oldest(places)


def tidy_up(places: Places, index: Index, log: DiskLog) -> None:
    """Removes what killed writers left: their places of writing, reservations, files of packs without entries."""
    for outer in places.writing.iterdir():
        if not WRITING_NAME.fullmatch(outer.name) or os.path.islink(outer):
            continue
        try:
            with Pin(outer, alone=True):
                shutil.rmtree(outer, ignore_errors=True)
        except (BusyError, OSError):  # being written; or another user's, which is theirs to remove
            continue
    for pack in index.packs("writing"):
        if (places.writing / pack).exists():
            continue
        # A pack whose writer was killed after the rename is complete: it is entered.
        if not places.has_pack(pack) or adopt(places, index, log, pack):
            index.forget_pack(pack, "writing")
    sweep(places, index)


def unknown_packs(places: Places, index: Index) -> list[str]:
    """Returns the packs that the index does not know."""
    if not places.packs.exists():
        return []
    present = [path.name for path in places.packs.iterdir() if PACK_NAME.fullmatch(path.name)]
    # Asked after listing: the index knows a pack before its files appear, and until they are gone.
    known = {pack for state in ("ready", "writing", "dead") for pack in index.packs(state)}
    return sorted(pack for pack in present if pack not in known and places.has_pack(pack))


def adopt_all(places: Places, index: Index, log: DiskLog) -> bool:
    """Enters the packs that the index does not know; returns whether all could be read. Repeating it does no harm."""
    unread = [pack for pack in unknown_packs(places, index) if not adopt(places, index, log, pack)]
    return not unread


def adopt(places: Places, index: Index, log: DiskLog, pack: str) -> bool:
    """Enters a pack in the index from its own `entries.json`; one that is damaged is quarantined.

    Returns:
        False where the pack may be readable later: it is being evicted, or the file system refuses just now.
    """
    path = places.pack(pack)
    try:
        with Pin(path) if places.local else nullcontext():  # so that nobody evicts it meanwhile
            records = read_contents(path).records
            index.add(pack, size_of(path), records, adopt=True)
    except BusyError:  # being evicted
        return False
    except OtherVersionError as error:
        log.warn_once(f"pack {pack} is of {error}; its entries count as missing", "outdated")
    except (DamagedRecordError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not places.local and isinstance(error, FileNotFoundError):  # not complete: being written, or abandoned
            return True
        if not places.has_pack(pack):  # another process has removed it
            return True
        log.count("damaged")
        log.warn(f"pack {pack} is not used: {error}")
        if places.writable and places.local:
            quarantine.set_aside(places, log, pack)
    except OSError as error:  # says nothing about the pack
        log.warn_once(f"pack {pack} cannot be read now: {error}", "read_errors")
        return False
    return True
