"""Dequantised weights in a file of the user's cache: a later process maps it, and neither reads nor dequantises.

A file of 93 MB takes seconds to dequantise to 540 MB, for a command that answers in as many. Processes that map the
same file share its memory.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import numpy as np

from cacheblend_jax.errors import one_line
from cacheblend_jax.model.gguf_checkpoint import GgufCheckpoint
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.transformer import abstract_params
from cacheblend_jax.model.weights import OpenedModel
from cacheblend_jax.model.weights_digest import are_settled, file_states
from cacheblend_jax.runtime.kept_programs import sources_digest
from cacheblend_jax.runtime.user_cache import WEIGHTS, cache_directory, is_kept, remove_all_but_newest, write_file
from pallas_kernels.dispatch import current_target

logger = logging.getLogger(__name__)
MOST_BYTES = 4 * 2**30  # of all these files: those written longest ago go first
MOST_BYTES_EACH = 2 * 2**30  # larger ones are not kept
ALIGNMENT = 64  # of arrays: what XLA for CPUs uses without a copy
PAGE = 4096
MOST_HEAD_BYTES = 2**20
CHECKED_BLOCK = 2**22  # bytes


def mapped_params(opened: OpenedModel) -> Params | None:
    """Returns a model's weights as arrays over a mapped file; `None` where there is none for its files as they are."""
    if not _may_keep(opened):
        return None
    path = _path(opened)
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _params(opened, content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("the weights kept in %s can't be used: %s", path, one_line(error))
        return None


def write_params(opened: OpenedModel, params: Params) -> None:
    """Writes weights for later processes, which takes a second or two for 500 MB.

    Only the second process that has dequantised them does so: the first one leaves a note alone. So a model that is
    tried once takes no room, and its only command doesn't end later. A failure is not raised: only time is lost.
    """
    if not _may_keep(opened):
        return
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    path, size = _path(opened), sum(array.nbytes for array in arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if size > MOST_BYTES_EACH or shutil.disk_usage(path.parent).free < 2 * size:
            logger.debug("%s: %d bytes of weights are not kept", path, size)
            return
        states = file_states(opened.checkpoint.directory, [state.name for state in opened.states or ()])
        if states != opened.states or not are_settled(opened.states or ()):
            return
        write_file(path, _parts(opened, arrays) if _is_noted(opened) else [json.dumps(_head(opened)).encode()])
        remove_all_but_newest(WEIGHTS, total_bytes=MOST_BYTES)
    except OSError as error:
        logger.debug("weights can't be kept in %s: %s", path, one_line(error))


def _may_keep(opened: OpenedModel) -> bool:
    checkpoint = opened.checkpoint
    is_quantised = isinstance(checkpoint, GgufCheckpoint) and checkpoint.is_quantised
    can_be_told = opened.states is not None and sources_digest() is not None
    return is_kept(WEIGHTS) and is_quantised and can_be_told and current_target().platform == "cpu"


def _path(opened: OpenedModel) -> Path:
    """Returns the file for a checkpoint at its place: a changed checkpoint replaces the one before."""
    place = [str(opened.checkpoint.directory.resolve()), *(state.name for state in opened.states or ())]
    name = json.dumps([*place, opened.config.dtype])
    return cache_directory(WEIGHTS) / sha256(name.encode()).hexdigest()[:32]


def _is_noted(opened: OpenedModel) -> bool:
    """Returns whether a file is there for this state of the checkpoint, whatever else is in it."""
    try:
        with open(_path(opened), "rb") as file:
            head = json.loads(file.readline(MOST_HEAD_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head | _head(opened) == head


def _parts(opened: OpenedModel, arrays: Sequence[np.ndarray]) -> list[Any]:
    """Returns what the file consists of: a head of whole pages, and the arrays, each at a multiple of 64 bytes."""
    padded: list[Any] = []
    for array in arrays:
        padded += [_bytes_of(array), bytes(-array.nbytes % ALIGNMENT)]
    checksum = 0
    for part in padded:
        checksum = _checksum(part, checksum)
    head = json.dumps(_head(opened) | {"crc32c": checksum}).encode()
    return [head, b" " * (-(len(head) + 1) % PAGE), b"\n", *padded]


def _params(opened: OpenedModel, content: mmap.mmap) -> Params:
    """Returns the weights in a file.

    Raises:
        ValueError: it is damaged, or of another checkpoint, or of another state of this one.
    """
    head = json.loads(content[: content.find(b"\n", 0, MOST_HEAD_BYTES) + 1])
    if not isinstance(head, dict) or head | _head(opened) != head:
        raise ValueError("it is of other weights")
    shapes, structure = jax.tree.flatten(abstract_params(opened.config))
    sizes = [math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes]
    begins = list(accumulate((size + -size % ALIGNMENT for size in sizes), initial=content.find(b"\n") + 1))
    if begins[-1] != len(content):
        raise ValueError(f"it has {len(content)} bytes, not {begins[-1]}")
    if _checksum(np.frombuffer(content, np.uint8, offset=begins[0])) != head.get("crc32c"):
        raise ValueError("it is damaged")
    arrays = [
        np.frombuffer(content, np.uint8, size, begin).view(shape.dtype).reshape(shape.shape)
        for shape, size, begin in zip(shapes, sizes, begins, strict=False)
    ]
    return jax.tree.unflatten(structure, jax.device_put(arrays))


def _head(opened: OpenedModel) -> dict[str, Any]:
    """Returns what a file must say of itself: what it was made of, and by what."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(opened.config))
    return {
        "made by": [sources_digest(), version("gguf")],
        "files": [asdict(state) for state in opened.states or ()],
        "leaves": [[jax.tree_util.keystr(name), list(leaf.shape), leaf.dtype.name] for name, leaf in leaves],
    }


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _checksum(content: Any, before: int = 0) -> int:
    for begin in range(0, len(content), CHECKED_BLOCK):  # others get the interpreter's lock in between
        before = google_crc32c.extend(before, content[begin : begin + CHECKED_BLOCK])
    return before
