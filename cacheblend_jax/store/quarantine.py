"""Keeps damaged packs for inspection: the latest of them, bounded in number and bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from etils import epath

from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.places import QUARANTINE_NAME, Places, is_local, is_there

MAX_PACKS = 16
MAX_BYTES = 2**30


def keep_pack(places: Places, index: Index, pack: str) -> None:
    """Moves a pack with a damaged entry, which the index has forgotten, to the quarantine.

    Where the pack holds other entries, it stays, and the quarantine gets a copy made of links.
    """
    source = places.pack(pack)
    places.quarantine.mkdir(exist_ok=True)
    kept = places.quarantine / source.name
    if not places.local:  # object storage has neither renames nor links
        if source.exists() and not index.listed(pack):
            source.rmtree()
    elif places.has_pack(pack) and not kept.exists():
        if not index.listed(pack):
            source.rename(kept)
        else:
            shutil.copytree(source, kept, symlinks=True, copy_function=os.link)
    if not places.has_pack(pack):
        index.bury(pack)
        index.forget_pack(pack, "dead")
    sweep(places, index)
    remove_oldest(places)


def set_aside(places: Places, log: DiskLog, pack: str) -> None:
    """Moves a pack that the index does not know to the quarantine."""
    kept = places.quarantine / pack
    if kept.exists():  # an earlier copy, made of links
        kept = places.quarantine / f"{pack}-{uuid.uuid4().hex}"
    try:
        places.pack(pack).rename(kept)
    except OSError as error:
        log.warn_once(f"a damaged pack cannot be quarantined: {error}", "write_errors")


def remove_oldest(places: Places) -> int:
    """Removes the oldest packs in the quarantine, until the rest is within its bounds; returns how many."""
    return _keep_latest(places, MAX_PACKS, MAX_BYTES)


def empty(places: Places) -> int:
    """Removes everything in the quarantine; returns how many packs."""
    return _keep_latest(places, 0, 0)


def _keep_latest(places: Places, max_packs: int, max_bytes: int) -> int:
    if not places.quarantine.exists():
        return 0
    found = []
    for path in places.quarantine.iterdir():
        if QUARANTINE_NAME.fullmatch(path.name) and is_there(path, places.local):
            with suppress(FileNotFoundError):  # another process removes it just now
                found.append((path.stat().mtime, _tree_bytes(path), path))
    kept = sorted(found, key=lambda each: each[0], reverse=True)
    sizes = itertools.accumulate(size for _, size, _ in kept)
    beyond = [
        path
        for i, ((_, _, path), size) in enumerate(zip(kept, sizes, strict=True))
        if i >= max_packs or size > max_bytes
    ]
    for path in beyond:
        with suppress(FileNotFoundError):
            path.rmtree() if path.is_dir() else path.unlink()
    return len(beyond)


def _tree_bytes(path: epath.Path) -> int:
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) if is_local(path) else 0
