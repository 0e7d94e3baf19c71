"""SHA-256 of a checkpoint's weight files: computed once, and remembered beside them while they stay as they are."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from platformdirs import user_cache_path

logger = logging.getLogger(__name__)
DIGEST_FILE = "cacheblend-digest.json"
REMEMBERED_BYTES = 2**26  # fewer are hashed again in less time than it takes to notice
SETTLED_SECONDS = 2.0  # a file changed later than that before now may change again within its time stamp

Signature = tuple[tuple[str, int, int], ...]


class SameLeaves:
    """Whether parameters are still those that they were, leaf by leaf: one that was replaced is not what was hashed.

    Holds no leaf: those that are replaced can be freed.
    """

    def __init__(self, params: Any) -> None:
        self._leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]

    def as_in(self, params: Any) -> bool:
        """Whether `params` has these very leaves."""
        leaves = jax.tree.leaves(params)
        return len(leaves) == len(self._leaves) and all(
            known() is leaf for known, leaf in zip(self._leaves, leaves, strict=True)
        )


@dataclass(frozen=True, eq=False)
class WeightFiles:
    """The files that parameters were loaded from, as they were then.

    `loaded` is what was loaded: parameters that someone has changed since are others, and have another digest.
    """

    directory: Path
    signature: Signature
    loaded: SameLeaves

    def digest(self) -> str | None:
        """Returns the SHA-256 (hex) over names and contents of the files; `None` where they changed since loading."""
        names = [name for name, _, _ in self.signature]
        if signature_of(self.directory, names) != self.signature:
            return None
        size = sum(size for _, size, _ in self.signature)
        if size < REMEMBERED_BYTES:
            return self._computed(names)
        known = _recall(self.directory, self.signature)
        if known is None:
            known = self._computed(names)
            if known is not None:
                _remember(self.directory, self.signature, known)
        return known

    def _computed(self, names: Iterable[str]) -> str | None:
        digest = hashlib.sha256()
        for name in names:
            with open(self.directory / name, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(len(name.encode()).to_bytes(8, "little") + name.encode() + content)
        unchanged = signature_of(self.directory, [name for name, _, _ in self.signature]) == self.signature
        return digest.hexdigest() if unchanged else None


def signature_of(directory: Path, names: Iterable[str]) -> Signature | None:
    """Returns name, bytes and time of change (ns) of each file; `None` where one is missing."""
    try:
        stats = [(name, os.stat(directory / name)) for name in sorted(names)]
    except OSError:
        return None
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def params_digest(params: Any) -> str:
    """Returns the SHA-256 (hex) over the parameters themselves: structure, shapes, dtypes and bits."""
    leaves, treedef = jax.tree.flatten(params)
    digest = hashlib.sha256(str(treedef).encode())
    for leaf in leaves:
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{array.dtype.name}{list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _places(directory: Path) -> list[Path]:
    """Where a digest is kept: beside the model, or in the user's cache where that cannot be written."""
    elsewhere = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]
    return [directory / DIGEST_FILE, user_cache_path("cacheblend-jax") / "digests" / f"{elsewhere}.json"]


def _recall(directory: Path, signature: Signature) -> str | None:
    for place in _places(directory):
        try:
            kept = json.loads(place.read_text(encoding="utf-8"))
            digest = kept["sha256"]
            if kept["files"] == [list(file) for file in signature] and len(bytes.fromhex(digest)) == 32:
                return digest
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _remember(directory: Path, signature: Signature, digest: str) -> None:
    if max(changed for _, _, changed in signature) > time.time_ns() - SETTLED_SECONDS * 10**9:
        return
    for place in _places(directory):
        temporary = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"files": signature, "sha256": digest}) + "\n", encoding="utf-8")
            os.replace(temporary, place)
            return
        except OSError as error:
            logger.debug("the weights' digest cannot be kept in %s: %s", place, error)
