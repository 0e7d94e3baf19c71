"""What weight files hold, as digests: of all their bytes, remembered while the files stay as they are, and of samples.

The full SHA-256 ties stored KV to its model. It takes seconds for large checkpoints, so it is remembered in the user's
cache and believed only for files of the same device, inode, size, times of change and sampled content.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cacheblend_jax.model.params import Params, is_by_layer
from cacheblend_jax.runtime.user_cache import read_record, write_record

logger = logging.getLogger(__name__)
REMEMBERED_BYTES = 2**26  # fewer bytes are hashed again faster than anyone notices
SETTLED_SECONDS = 2.0  # a file changed less long ago may change again without a new time stamp
SAMPLES, SAMPLE_BYTES = 64, 4096


class SameLeaves:
    """Recognises parameters that are still those it was made from, leaf by leaf: a replaced leaf was never hashed.

    Keeps no array alive. Shapes in the leaves' place, which hold no memory, are kept.
    """

    def __init__(self, params: Any) -> None:
        self._leaves = [_reference(leaf) for leaf in jax.tree.leaves(params)]

    def as_in(self, params: Any) -> bool:
        """Returns whether `params` has these very leaves."""
        leaves = jax.tree.leaves(params)
        return len(leaves) == len(self._leaves) and all(
            known() is leaf for known, leaf in zip(self._leaves, leaves, strict=True)
        )


def _reference(leaf: Any) -> Callable[[], Any]:
    return (lambda: leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else weakref.ref(leaf)


@dataclass(frozen=True)
class FileState:
    """A file as it was at one time: whatever changes its content changes one of these.

    `mtime_ns` can be set to any value, by unpacking an archive for example; `ctime_ns` can't. `sample` is the SHA-256
    (hex) of evenly spaced blocks of the file.
    """

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    sample: str


def file_states(directory: Path, names: Iterable[str]) -> tuple[FileState, ...] | None:
    """Returns the state of each file, by name; `None` where one can't be read or changes meanwhile."""
    try:
        return tuple(_file_state(directory, name) for name in sorted(names))
    except OSError as error:
        logger.debug("the state of a weight file is unknown: %s", error)
        return None


def _file_state(directory: Path, name: str) -> FileState:
    with open(directory / name, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        sample = hashlib.sha256()
        for offset in _sample_offsets(before.st_size):
            file.seek(offset)
            sample.update(file.read(SAMPLE_BYTES))
        after = os.fstat(file.fileno())
    if _stamp(before) != _stamp(after):
        raise OSError(f"{directory / name} changed while it was read")
    return FileState(name, *_stamp(before), sample.hexdigest())


def _sample_offsets(size: int) -> list[int]:
    """Returns where the blocks begin: evenly spaced, the first at the beginning and the last at the end."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [(size - SAMPLE_BYTES) * block // (SAMPLES - 1) for block in range(SAMPLES)]


def _stamp(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def are_settled(states: Iterable[FileState]) -> bool:
    """Returns whether files changed long enough ago that a further change would show in their times."""
    settled = time.time_ns() - SETTLED_SECONDS * 10**9
    return all(max(state.mtime_ns, state.ctime_ns) <= settled for state in states)


@dataclass(frozen=True, eq=False)
class WeightFiles:
    """The files that parameters were loaded from, as they were then.

    `loaded` recognises what was loaded: parameters that someone has changed since have another digest.
    """

    directory: Path
    states: tuple[FileState, ...]
    loaded: SameLeaves
    verified: str | None = None  # a digest that was computed from all bytes since loading

    def digest(self, *, verify: bool = False) -> str | None:
        """Returns the SHA-256 (hex) over names and contents of the files; `None` where they changed since loading.

        Args:
            verify: compute it from all bytes and remember it anew, whatever is remembered.
        """
        if self._current() != self.states:
            return None
        if self.verified is not None and not verify:
            return self.verified
        is_remembered = sum(state.size for state in self.states) >= REMEMBERED_BYTES
        known = self._recall() if is_remembered else None
        if known is not None and not verify:
            return known
        computed = self._computed()
        if computed is not None and is_remembered:
            if known not in (None, computed):
                logger.warning("%s: the digest remembered for its weights was wrong and is replaced", self.directory)
            self._remember(computed)
        return computed

    def _current(self) -> tuple[FileState, ...] | None:
        return file_states(self.directory, [state.name for state in self.states])

    def _computed(self) -> str | None:
        digest = hashlib.sha256()
        for name in [state.name for state in self.states]:
            with open(self.directory / name, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(len(name.encode()).to_bytes(8, "little") + name.encode() + content)
        return digest.hexdigest() if self._current() == self.states else None

    def _record_name(self) -> str:
        # One record for each directory, and each GGUF file in it: a changed checkpoint replaces the one before.
        name = self.states[0].name
        place = self.directory.resolve() if name.endswith(".safetensors") else self.directory.resolve() / name
        return hashlib.sha256(str(place).encode()).hexdigest()[:32]

    def _recall(self) -> str | None:
        record = read_record("digests", self._record_name())
        if record is None or record.get("files") != [asdict(state) for state in self.states]:
            return None
        digest = record.get("sha256")
        return digest if isinstance(digest, str) and len(digest) == 64 else None

    def _remember(self, digest: str) -> None:
        if not are_settled(self.states):
            return
        try:
            write_record(
                "digests", self._record_name(), {"files": [asdict(state) for state in self.states], "sha256": digest}
            )
        except OSError as error:
            logger.debug("the digest of the weights in %s can't be remembered: %s", self.directory, error)


def content_digest(states: Iterable[FileState]) -> str:
    """Returns a SHA-256 (hex) over sizes and samples, whatever the files' names: enough to recognise a model by."""
    return hashlib.sha256("".join(f"{state.size} {state.sample}\n" for state in states).encode()).hexdigest()


def sampled_digest(states: Iterable[FileState]) -> str:
    """Returns a SHA-256 (hex) over names, sizes and samples: the same for a copy of the files elsewhere."""
    digest = hashlib.sha256()
    for state in states:
        digest.update(f"{len(state.name)} {state.name} {state.size} {state.sample}\n".encode())
    return digest.hexdigest()


def params_digest(params: Params) -> str:
    """Returns the SHA-256 (hex) over the parameters themselves: structure, shapes, dtypes and bits.

    It is the same for all forms of `Params`.
    """
    leaves, treedef = jax.tree.flatten(params.separated(), is_leaf=is_by_layer)
    digest = hashlib.sha256(str(treedef).encode())
    for leaf in leaves:
        layers = leaf if is_by_layer(leaf) else (leaf,)
        shape = [len(layers), *layers[0].shape] if is_by_layer(leaf) else list(leaf.shape)
        digest.update(f"{layers[0].dtype.name}{shape}".encode())
        for layer in layers:
            digest.update(np.ascontiguousarray(jax.device_get(layer)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
