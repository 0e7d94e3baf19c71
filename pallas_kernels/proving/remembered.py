"""Verdicts in files of the user's cache directory: one for each device, driver, release of jax and state of sources."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from pallas_kernels.verdicts import Verdicts

FORMAT = 1


def cache_directory() -> Path:
    """Returns where verdicts are kept."""
    try:
        from platformdirs import user_cache_path
    except ImportError:  # the kernels can be used without it
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cacheblend-jax" / "kernels"
    return user_cache_path("cacheblend-jax") / "kernels"


def path_of(identity: dict[str, str]) -> Path:
    """Returns the file of the verdicts that hold for `identity`."""
    return cache_directory() / f"{_digest(identity)[:32]}.json"


def recall(identity: dict[str, str]) -> Verdicts | None:
    """Returns what is remembered; `None` where that is nothing, damaged, or of another format."""
    try:
        record = json.loads(path_of(identity).read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["sha256"] != _digest(record["verdicts"]):
            return None
        verdicts = Verdicts.from_record(record["verdicts"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return verdicts if verdicts.identity == identity else None


def remember(verdicts: Verdicts) -> Path:
    """Adds verdicts to those in their file, and returns the file.

    It is written in one step, so that no reader ever sees half of it. Of two processes that add to it at the same
    moment, one may be forgotten: its trials are then lacking, and made again.

    Raises:
        OSError: the user's cache directory can't be written.
    """
    known = recall(verdicts.identity)
    path, record = path_of(verdicts.identity), (verdicts if known is None else known.merged_with(verdicts)).record()
    text = json.dumps({"format": FORMAT, "sha256": _digest(record), "verdicts": record}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
