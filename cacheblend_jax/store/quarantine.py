"""Where damaged packs are kept for inspection: the latest of them, bounded in number and bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_jax.store.eviction import sweep
from cacheblend_jax.store.location import is_local

if TYPE_CHECKING:
    from cacheblend_jax.store.disk import DiskTier

MOST_QUARANTINED = 16
QUARANTINE_BYTES = 2**30


def keep_pack(disk: DiskTier, pack: str) -> None:
    """Moves a pack to the quarantine, or where other entries live in it, a copy made of links."""
    source = disk.pack_path(pack)
    kept = disk.root / "quarantine" / source.name
    if not disk.local:  # object storage has neither renames nor links
        if source.exists() and not disk.index.listed(pack):
            source.rmtree()
    elif source.exists() and not kept.exists():
        if not disk.index.listed(pack):
            source.rename(kept)
        else:
            shutil.copytree(source, kept, copy_function=os.link)
    if not source.exists():
        disk.index.bury(pack)
        disk.index.forget_pack(pack, "dead")
    sweep(disk)
    bound(disk)


def set_aside(disk: DiskTier, pack: str) -> None:
    """Moves a pack that the index does not know to the quarantine."""
    kept = disk.root / "quarantine" / pack
    if kept.exists():  # an earlier one's copy, made of links
        kept = disk.root / "quarantine" / f"{pack}-{uuid.uuid4().hex}"
    try:
        disk.pack_path(pack).rename(kept)
    except OSError as error:
        disk.say_once(f"store {disk.root}: a damaged pack cannot be quarantined: {error}", "write_errors")


def bound(disk: DiskTier, most: int | None = None, most_bytes: int = QUARANTINE_BYTES) -> int:
    """Removes the oldest of what is in quarantine beyond a count or bytes; returns how many."""
    if not (disk.root / "quarantine").exists():
        return 0
    most = MOST_QUARANTINED if most is None else most
    kept = sorted((disk.root / "quarantine").iterdir(), key=lambda path: path.stat().mtime, reverse=True)
    sizes = itertools.accumulate(_tree_bytes(path) for path in kept)
    beyond = [path for i, (path, size) in enumerate(zip(kept, sizes, strict=True)) if i >= most or size > most_bytes]
    for path in beyond:
        path.rmtree() if path.is_dir() else path.unlink()
    return len(beyond)


def _tree_bytes(path: Any) -> int:
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) if is_local(path) else 0
