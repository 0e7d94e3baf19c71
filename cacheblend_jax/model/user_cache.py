"""Small JSON records in the user's cache directory: what is known of a checkpoint between runs.

Nothing is written beside the checkpoint itself, and nothing that travels with its files is believed.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def record_path(kind: str, name: str) -> Path:
    """Returns where the record `name` of a kind (`"digests"`, say) is kept."""
    return user_cache_path("cacheblend-jax") / kind / f"{name}.json"


def read_record(kind: str, name: str) -> dict[str, Any] | None:
    """Returns a record; `None` where there is none that can be read."""
    try:
        record = json.loads(record_path(kind, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_record(kind: str, name: str, record: dict[str, Any]) -> Path:
    """Writes a record in one step, so that no reader ever sees half of it, and returns its file.

    Raises:
        OSError: the user's cache directory can't be written.
    """
    path = record_path(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def remove_all_but_newest(kind: str, count: int) -> None:
    """Removes the records of a kind that were written longest ago, and what interrupted writers have left of them."""
    files = record_path(kind, "").parent.iterdir()
    ages = sorted(((file.stat().st_mtime_ns, file) for file in files), reverse=True)
    for _, file in ages[count:]:
        file.unlink(missing_ok=True)
