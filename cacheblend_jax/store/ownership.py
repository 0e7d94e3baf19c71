"""Tells a store's directory from any other, by a marker in it: nothing else is written to or cleaned as a store."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator

from etils import epath

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.index_file import INDEX_ERRORS, connected, has_index_header, is_regular
from cacheblend_jax.store.marker import MARKER_NAME, MARKER_VERSION, Marker, changing_marker, read_marker, write_marker
from cacheblend_jax.store.places import CALIBRATION_NAME, INDEX_NAME, PACK_NAME

DIRECTORIES = ("packs", "writing", "quarantine")  # what a store makes in its directory
INDEX_FILES = tuple(INDEX_NAME + suffix for suffix in ("", "-wal", "-shm", "-journal"))
_UNFINISHED_MARKER = re.compile(re.escape(MARKER_NAME) + r"\.[0-9a-f]{32}")
# File systems and file managers make these in directories that are empty to their users.
PASSED_OVER = ("lost+found", ".DS_Store", "Thumbs.db", "desktop.ini")
RECORDS_BEGIN = b'{"crc32c":'  # of a pack's `entries.json`


def is_store(root: epath.Path, *, local: bool) -> bool:
    """Whether a directory is a store: it has a marker, or was made by a version that wrote none."""
    return root.is_dir() and (_has_marker(root, local) or _was_made_before_markers(root, local))


def is_whole(root: epath.Path, *, local: bool) -> bool:
    """Whether a store's directory still has all that `make_directories` made; nothing is checked on object storage."""
    return not local or (_has_marker(root, local) and all((root / name).is_dir() for name in DIRECTORIES))


def make_directories(root: epath.Path, local: bool, log: DiskLog) -> bool:
    """Makes a store's directories; returns whether this process may write there.

    Raises:
        CacheBlendError: there is no directory, and none can be made; or, as `claim`, it is not a store's.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        claim(root, log, local=local)
        for name in DIRECTORIES:
            if local or name != "writing":
                (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not root.exists():
            raise CacheBlendError(f"store {str(root)!r} cannot be made: {reason_and_remedy(error)}") from error
        log.warn(f"entries are read, but not written: {error}")
        return False
    if local and not os.access(root, os.W_OK | os.X_OK):
        log.warn("entries are read, but not written: this process may not write there")
        return False
    return True


def claim(root: epath.Path, log: DiskLog, *, local: bool) -> None:
    """Checks that a directory is a store, or is free to become one, and marks it as one.

    Raises:
        CacheBlendError: it holds something else, or is a store of a later format; a directory that belongs in it is a
            symbolic link.
        OSError: it cannot be marked.
    """
    if local:
        _refuse_links(root)
    if _has_marker(root, local) and _check_version(root):
        return
    with changing_marker(root, local=local):
        _claim_held(root, log, local)


def _claim_held(root: epath.Path, log: DiskLog, local: bool) -> None:
    """As `claim`, of a directory that had no intact marker before it was held."""
    if _has_marker(root, local):
        if _check_version(root):
            return
        log.warn(f"{MARKER_NAME} is damaged and written anew")
        (root / MARKER_NAME).unlink(missing_ok=True)
    elif _was_made_before_markers(root, local):
        try:
            _mark(root, local)
        except OSError as error:  # no room, no permission: it is recognised without
            log.warn(f"{MARKER_NAME} cannot be written: {error}")
        return
    else:
        is_free = _is_free(root, local)
        if _has_marker(root, local):  # another process has marked it by now, where nothing could hold it
            _check_version(root)
            return
        if not is_free:
            raise CacheBlendError(
                f"store {os.fspath(root)!r} is a directory with other files in it; "
                "choose a path that does not exist, or an empty directory"
            )
    _mark(root, local)


def _refuse_links(root: epath.Path) -> None:
    for name in DIRECTORIES:
        if os.path.islink(root / name):
            raise CacheBlendError(
                f"store {os.fspath(root)!r} has a symbolic link {name!r} in it, which a store does not follow; "
                "remove it, or make the store's directory itself the link"
            )


def _has_marker(root: epath.Path, local: bool) -> bool:
    marker = root / MARKER_NAME
    return marker.exists() and not (local and os.path.islink(marker))


def _check_version(root: epath.Path) -> bool:
    """Returns whether the marker is intact.

    Raises:
        CacheBlendError: it is, and of a later version.
    """
    try:
        marker = read_marker(root)
    except OSError:
        return False
    if marker is not None and marker.version != MARKER_VERSION:
        raise CacheBlendError(
            f"store {os.fspath(root)!r} is of format {marker.version}, and this version of cacheblend-jax reads format "
            f"{MARKER_VERSION}; upgrade, or choose another path"
        )
    return marker is not None


def _mark(root: epath.Path, local: bool) -> None:
    write_marker(root, Marker(uuid.uuid4().hex, MARKER_VERSION), local=local)


def _was_made_before_markers(root: epath.Path, local: bool) -> bool:
    """Whether a directory without a marker has an index or a pack that only a store can have written."""
    return (local and _is_index(os.path.abspath(root / INDEX_NAME))) or any(map(_is_pack, _packs(root)))


def _packs(root: epath.Path) -> Iterator[epath.Path]:
    packs = root / "packs"
    if packs.is_dir() and not os.path.islink(packs):
        yield from (path for path in packs.iterdir() if PACK_NAME.fullmatch(path.name))


def _is_pack(path: epath.Path) -> bool:
    try:
        return (path / "entries.json").read_bytes().startswith(RECORDS_BEGIN)
    except (OSError, ValueError):
        return False


def _is_index(path: str) -> bool:
    """Whether a file is our index; it may be damaged."""
    if not is_regular(path):
        return False
    if has_index_header(path):
        return True
    if not os.path.exists(path + "-wal"):  # before its first checkpoint, all of an index is in the log beside it
        return False
    try:
        connected(path, "mode=ro").close()
    except (OSError, *INDEX_ERRORS):
        return False
    return True


def _is_free(root: epath.Path, local: bool) -> bool:
    """Whether a directory has nothing in it that a store did not make, so that marking it takes nobody's files."""
    if not root.is_dir():  # on object storage, there is no directory before there is a file in it
        return True
    return all(_is_nothing(path, local) for path in root.iterdir())


def _is_nothing(path: epath.Path, local: bool) -> bool:
    name = path.name
    if local and os.path.islink(path):
        return False
    if name in (*PASSED_OVER, MARKER_NAME) or _UNFINISHED_MARKER.fullmatch(name):
        return True
    if name in DIRECTORIES and path.is_dir():
        # A killed calibration of a new store leaves its probes. On object storage, packs have no file until complete.
        left = {"writing": CALIBRATION_NAME} | ({} if local else {"packs": PACK_NAME})
        return all(name in left and left[name].fullmatch(child.name) for child in path.iterdir())
    return name in INDEX_FILES and local and is_regular(path) and not os.path.getsize(path)
