"""Where a store lies: a directory of this machine, by its absolute path, or one on object storage, by its URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from etils import epath

from cacheblend_jax.errors import CacheBlendError

PACK_NAME = re.compile("[0-9a-f]{32}")


def is_local(path: Any) -> bool:
    """Whether a path is on this machine's file systems, where renaming and locking work."""
    return "://" not in os.fspath(path)


def located(directory: str | Path) -> epath.Path:
    """Returns a store's directory: absolute, so that it stays the same one when the process changes its own.

    Raises:
        CacheBlendError: the path has a backslash in it.
    """
    if not is_local(directory):
        return epath.Path(directory)
    path = os.path.abspath(os.path.expanduser(directory))
    if os.sep != "\\" and "\\" in path:  # TensorStore reads it as a slash, and would look for the packs elsewhere
        raise CacheBlendError(f"store {path!r} has a backslash in its path; choose a path without one")
    return epath.Path(path)
