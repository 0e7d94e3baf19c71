"""The marker file of a store's directory: what the directory is, and the text that its chunks are precomputed after."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from etils import epath

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.store.pins import held
from cacheblend_jax.store.places import Places
from cacheblend_jax.store.record import MALFORMED, canonical_json, crc32c_of_bytes

MARKER_NAME = "cacheblend-store.json"
MARKER_FORMAT = "cacheblend_jax store"
MARKER_VERSION = 1


@dataclass(frozen=True)
class Marker:
    """A marker's content.

    Attributes:
        id: the directory's own, hexadecimal.
        version: of the format.
        contexts: texts that chunks are precomputed after, by the salt that records have (`record.salt_hash`); stores
            of different salts share nothing.
    """

    id: str
    version: int
    contexts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def read_marker(root: epath.Path) -> Marker | None:
    """Returns a directory's marker; `None` where it is damaged.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    text = (root / MARKER_NAME).read_bytes()
    try:
        value = json.loads(text)
        body: dict[str, Any] = value["store"]
        if value["crc32c"] != crc32c_of_bytes(canonical_json(body)) or body["format"] != MARKER_FORMAT:
            return None
        contexts = {str(salt): str(context) for salt, context in body.get("contexts", {}).items()}
        return Marker(str(body["id"]), int(body["version"]), MappingProxyType(contexts))
    except MALFORMED:
        return None


def directory_id(root: epath.Path) -> str | None:
    """Returns what a store's directory is known by, wherever it is mounted; `None` where it has no intact marker."""
    try:
        marker = read_marker(root)
    except OSError:
        return None
    return None if marker is None else marker.id


def write_marker(root: epath.Path, marker: Marker, *, local: bool) -> None:
    """Writes or replaces a directory's marker, which is whole whenever it is there."""
    body: dict[str, Any] = {"format": MARKER_FORMAT, "version": marker.version, "id": marker.id}
    if marker.contexts:
        body["contexts"] = dict(marker.contexts)
    text = canonical_json({"crc32c": crc32c_of_bytes(canonical_json(body)), "store": body})
    if not local:
        (root / MARKER_NAME).write_bytes(text)
        return
    unfinished = root / f"{MARKER_NAME}.{uuid.uuid4().hex}"
    try:
        unfinished.write_bytes(text)
        os.replace(unfinished, root / MARKER_NAME)
    finally:
        unfinished.unlink(missing_ok=True)


def changing_marker(root: epath.Path, *, local: bool) -> AbstractContextManager[None]:
    """Keeps other processes from changing a directory's marker while the body reads it and writes it anew."""
    return held(root, alone=True) if local else nullcontext()


def remembered_context(places: Places, salt: str) -> str | None:
    """Returns the context that a directory's marker holds for a salt; `None` where it holds none, or cannot be read."""
    try:
        marker = read_marker(places.root)
    except OSError:
        return None
    return None if marker is None else marker.contexts.get(salt)


def remember_context(places: Places, salt: str, text: str) -> str:
    """Has a directory's marker hold a context for a salt, unless it holds one; returns the one that it holds then.

    Raises:
        CacheBlendError: the marker cannot be written.
    """
    try:
        with changing_marker(places.root, local=places.local):
            marker = read_marker(places.root) or Marker(uuid.uuid4().hex, MARKER_VERSION)
            if salt not in marker.contexts:
                marker = replace(marker, contexts={**marker.contexts, salt: text})
                write_marker(places.root, marker, local=places.local)
    except OSError as error:
        raise CacheBlendError(
            f"store {str(places.root)!r} cannot remember a context: {reason_and_remedy(error)}"
        ) from error
    return marker.contexts[salt]
