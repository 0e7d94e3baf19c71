"""Where a store lies, and where in its directory its packs, its index and its quarantine are."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from etils import epath

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.object_path import ObjectPath

PACK_NAME = re.compile("[0-9a-f]{32}")
CALIBRATION_NAME = re.compile("calibration-[0-9a-f]{32}")  # of a calibration's probes, beside the packs being written
# Anything of another name was not made by a store, which leaves it alone.
WRITING_NAME = re.compile(f"{PACK_NAME.pattern}|{CALIBRATION_NAME.pattern}")
QUARANTINE_NAME = re.compile(f"(index-)?{PACK_NAME.pattern}|{PACK_NAME.pattern}-{PACK_NAME.pattern}")
INDEX_NAME = "index.sqlite"
SCHEMES = ("gs://", "s3://")  # of object storage that both Orbax and TensorStore know


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on this machine's file systems, where renames and locks work."""
    return "://" not in os.fspath(path)


def located(directory: str | os.PathLike[str]) -> epath.Path:
    """Returns a store's directory as an absolute path, so that it stays the same when the process changes its own.

    Raises:
        CacheBlendError: the path is empty, is none that the file system can hold, or has a backslash in it; or it is a
            URL of a kind that is not supported.
    """
    if not os.fspath(directory):
        raise CacheBlendError("the store's path is empty; expected that of a directory ('.' is the current one)")
    if not is_local(directory):
        if not os.fspath(directory).startswith(SCHEMES):
            raise CacheBlendError(
                f"store {os.fspath(directory)!r} is a URL of a kind that is not supported; expected a path, "
                f"or a URL that begins with {' or '.join(SCHEMES)}"
            )
        return ObjectPath(directory)
    try:
        if b"\0" in os.fsencode(directory):
            raise ValueError("it has a zero byte in it")
    except ValueError as error:  # `UnicodeEncodeError` is one
        raise CacheBlendError(f"store {os.fspath(directory)!r} is no path: {error}") from error
    path = os.path.abspath(os.path.expanduser(directory))
    if os.sep != "\\" and "\\" in path:  # TensorStore reads it as a slash, and would look for the packs elsewhere
        raise CacheBlendError(f"store {path!r} has a backslash in its path; choose a path without one")
    return epath.Path(path)


def is_file(root: epath.Path) -> bool:
    """Whether there is a file in the place of a store's directory.

    Raises:
        CacheBlendError: it is on object storage, and the package for that is not installed, or cannot reach it.
    """
    try:
        return root.exists() and not root.is_dir()
    except ImportError as error:
        raise CacheBlendError(f"store {os.fspath(root)!r} needs a package that is not installed: {error}") from error
    except OSError as error:
        raise CacheBlendError(f"store {os.fspath(root)!r} cannot be reached: {error}") from error


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

    def has_pack(self, name: object) -> bool:
        """Whether the files of a pack are there. A symbolic link is no pack: what it leads to belongs to others."""
        return is_there(self.pack(name), self.local)


def is_there(path: epath.Path, local: bool) -> bool:
    """Whether there is a file or directory, not counting symbolic links."""
    return path.exists() and not (local and os.path.islink(path))
