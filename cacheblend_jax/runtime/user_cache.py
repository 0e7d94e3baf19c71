"""Files in the user's cache directory: what is known of checkpoints and programs between runs.

Nothing is written beside the checkpoint itself, and nothing that travels with its files is believed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGAN = time.time()  # before most modules are imported, and anything is traced
PROGRAMS, WEIGHTS = "programs", "weights"  # kinds of files that are kept where a process asks for it: they take room
_kept: set[str] = set()


def keep(kind: str) -> None:
    """Has files of a kind be used, and written, from now on in this process."""
    _kept.add(kind)


def is_kept(kind: str) -> bool:
    """Returns whether `keep` was called for a kind."""
    return kind in _kept


def cache_directory(kind: str) -> Path:
    """Returns the directory of a kind of files (`"digests"`, say)."""
    from platformdirs import user_cache_path  # images for GPUs may lack it, where nothing is kept

    return user_cache_path("cacheblend-jax") / kind


def record_path(kind: str, name: str) -> Path:
    """Returns where the record `name` of a kind is kept."""
    return cache_directory(kind) / f"{name}.json"


def read_record(kind: str, name: str) -> dict[str, Any] | None:
    """Returns a record; `None` where there is none that can be read."""
    try:
        record = json.loads(record_path(kind, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_record(kind: str, name: str, record: dict[str, Any]) -> Path:
    """Writes a small JSON record in one step, and returns its file.

    Raises:
        OSError: the user's cache directory can't be written.
    """
    path = record_path(kind, name)
    write_file(path, [(json.dumps(record) + "\n").encode()])
    return path


def write_file(path: Path, parts: Iterable[Any]) -> None:
    """Writes a file, given in parts of bytes or contiguous arrays, in one step: no reader ever sees half of it.

    Whoever has the file before it open, or mapped, keeps that.

    Raises:
        OSError: the directory can't be written, or is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # for its owner alone
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_all_but_newest(kind: str, count: int | None = None, *, total_bytes: int | None = None) -> None:
    """Removes the files of a kind that were written longest ago, and what interrupted writers have left of them.

    Args:
        count: how many stay, at most.
        total_bytes: how many bytes they take, at most.
    """
    found = []
    for file in cache_directory(kind).iterdir():
        try:
            stat = file.stat()
        except FileNotFoundError:  # another process removed it
            continue
        found.append((stat.st_mtime_ns, file, stat.st_size))
    kept_bytes = 0
    for place, (_, file, size) in enumerate(sorted(found, reverse=True)):
        kept_bytes += size
        if (count is not None and place >= count) or (total_bytes is not None and kept_bytes > total_bytes):
            file.unlink(missing_ok=True)
