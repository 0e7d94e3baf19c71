"""Where a store's directory is: on this machine's file systems, or in object storage."""

from __future__ import annotations

import os
from typing import Any


def is_local(path: Any) -> bool:
    """Whether a path is on this machine's file systems, where renaming and locking work."""
    return "://" not in os.fspath(path)
