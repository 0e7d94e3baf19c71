"""Makes space where the file system has none left: even to remove entries, the index needs some for its log."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from cacheblend_jax.errors import FULL, CacheBlendError
from cacheblend_jax.store import quarantine
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.eviction import held_alone, make_room
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.index_file import INDEX_ERRORS
from cacheblend_jax.store.places import PACK_NAME, Places

Result = TypeVar("Result")
MARGIN = 2**18  # bytes left free for the index's log
ATTEMPTS = 8  # another process may take what is freed
WRITE_ERRORS = (OSError, ValueError, RuntimeError, *INDEX_ERRORS)  # of the file system, TensorStore, Orbax and SQLite


def lacks_space(places: Places, error: BaseException) -> bool:
    """Whether something failed because the file system, or the user's quota, is full."""
    if not places.local:
        return False
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):  # so it reports files that it cannot make or extend
        return _free_bytes(places) < MARGIN
    return code == sqlite3.SQLITE_FULL or any(os.strerror(number) in str(error) for number in FULL)


def with_space(
    places: Places,
    index: Index | None,
    log: DiskLog,
    action: Callable[[], Result],
    doomed: Callable[[], Iterable[str]] = tuple,
) -> tuple[Result, list[str]]:
    """Returns what `action` returns; where it fails for want of space, makes some and calls it again.

    Space comes from the index's log, then from the quarantine, then from packs, whose files go before the index can be
    told: should the process die in between, their entries are found missing when they are looked up.

    Args:
        index: `None` while there is none: `action` opens it.
        doomed: returns packs that will go anyway, which are taken first.

    Returns:
        What `action` returned, and the packs whose files were removed: see `forget_removed`.
    """
    removed: list[str] = []
    for _ in range(ATTEMPTS):
        try:
            return action(), removed
        except WRITE_ERRORS as error:
            if not lacks_space(places, error):
                raise
            if not (_shrinks(index) or quarantine.empty(places) or _removes_a_pack(places, index, doomed, removed)):
                raise
    return action(), removed


def forget_removed(index: Index, log: DiskLog, removed: Iterable[str]) -> None:
    """Takes packs whose files `with_space` removed out of the index, and says so."""
    entries = 0
    for pack in removed:
        entries += index.bury(pack)
        index.forget_pack(pack, "dead")
    if entries:
        log.count("evicted", entries)
        log.warn(f"the disk is full: {entries} entries were evicted to make space")


def make_space(places: Places, index: Index, log: DiskLog, size: int) -> None:
    """Evicts packs until a pack of `size` bytes, which the index has reserved, finds space on the file system.

    Raises:
        OSError: it does not, whatever is evicted. Nothing is evicted where that can be known beforehand.
    """
    if not places.local or _free_bytes(places) >= size + MARGIN:
        return
    index.shrink_log()
    quarantine.empty(places)
    while (missing := size + MARGIN - (free := _free_bytes(places))) > 0:
        held = index.totals()[0]
        if missing <= held - size:
            make_room(places, index, log, held - missing)
        if _free_bytes(places) <= free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cannot_write(places: Places) -> CacheBlendError:
    """Returns the error for a directory that cannot be written: it lacks space, or the right to."""
    full = places.local and _free_bytes(places) < MARGIN
    remedy = "its file system is full; free some space" if full else "open it with the right to"
    return CacheBlendError(f"store {str(places.root)!r} cannot be written: {remedy}")


def _free_bytes(places: Places) -> int:
    try:
        return shutil.disk_usage(places.root).free
    except OSError:
        return 0


def _shrinks(index: Index | None) -> bool:
    return index is not None and index.shrink_log()


def _removes_a_pack(
    places: Places, index: Index | None, doomed: Callable[[], Iterable[str]], removed: list[str]
) -> bool:
    """Removes the files of one pack that nobody reads, if there is one."""
    for pack in _in_order(places, index, doomed):
        if pack in removed or not places.has_pack(pack):
            continue
        with held_alone(places, pack) as is_free:
            if is_free:
                shutil.rmtree(places.pack(pack), ignore_errors=True)
        if not places.has_pack(pack):
            removed.append(pack)
            return True
    return False


def _in_order(places: Places, index: Index | None, doomed: Callable[[], Iterable[str]]) -> list[str]:
    """Returns packs in the order in which they may go: by the index, or by their age where it cannot be read."""
    with suppress(OSError, *INDEX_ERRORS):
        if index is not None:
            return [*doomed(), *index.in_order()]
        with closing(Index(places.index, read_only=True)) as to_read:
            return to_read.in_order()
    packs = [path for path in Path(places.packs).iterdir() if PACK_NAME.fullmatch(path.name)]
    return [path.name for path in sorted(packs, key=lambda path: path.stat().st_mtime_ns)]
