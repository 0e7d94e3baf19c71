"""Where a store lies, and where in its directory its packs, its index and its quarantine are."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from etils import epath

from cacheblend_jax.errors import CacheBlendError

PACK_NAME = re.compile("[0-9a-f]{32}")
INDEX_NAME = "index.sqlite"


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on this machine's file systems, where renames and locks work."""
    return "://" not in os.fspath(path)


def located(directory: str | os.PathLike[str]) -> epath.Path:
    """Returns a store's directory as an absolute path, so that it stays the same when the process changes its own.

    Raises:
        CacheBlendError: the path has a backslash in it.
    """
    if not is_local(directory):
        return epath.Path(directory)
    path = os.path.abspath(os.path.expanduser(directory))
    if os.sep != "\\" and "\\" in path:  # TensorStore reads it as a slash, and would look for the packs elsewhere
        raise CacheBlendError(f"store {path!r} has a backslash in its path; choose a path without one")
    return epath.Path(path)


@dataclass(frozen=True)
class Places:
    """The places of a store's directory, described in docs/store-format.md.

    Attributes:
        root: the directory: an absolute path, or a URL.
        local: whether it is on this machine's file systems, where renames and locks work.
        writable: whether this process may write there.
    """

    root: epath.Path
    local: bool
    writable: bool

    @property
    def packs(self) -> epath.Path:
        """Complete packs, each under its own name."""
        return self.root / "packs"

    @property
    def writing(self) -> epath.Path:
        """Packs that are being written."""
        return self.root / "writing"

    @property
    def quarantine(self) -> epath.Path:
        """Damaged packs and indexes, kept for inspection."""
        return self.root / "quarantine"

    @property
    def index(self) -> str:
        """The file of the index, of a local directory."""
        return os.path.abspath(self.root / INDEX_NAME)

    def pack(self, name: object) -> epath.Path:
        """The directory of a pack. A damaged index may hold any name: one that is not a pack's leads nowhere."""
        return self.packs / (name if isinstance(name, str) and PACK_NAME.fullmatch(name) else "no-pack")
