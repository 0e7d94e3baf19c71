"""Writes arrays with Orbax so that single layers can be read. Nothing else uses `orbax.checkpoint.v1`, a young API."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from cacheblend_jax.store.head_groups import head_axis, num_groups
from cacheblend_jax.store.kvstore import KvStoreSpec, base_spec
from cacheblend_jax.store.places import is_local

TREE = "state"  # Orbax's name of the tree in a checkpoint
_one_at_a_time = threading.Lock()  # of two saves at the same time, Orbax may lose one ("was never awaited")
DATA_FILE_BYTES = 2**25  # larger packs are split into files of this size, which are written in parallel


def save_tree(path: epath.Path, tree: dict[str, Any]) -> None:
    """Writes nested dicts of arrays, `[layers, tokens, kv_heads, head_dim]` or less an axis, as an Orbax checkpoint.

    Each layer is a storage chunk of its own, in which one KV head comes after the other, so that some of them are a
    range of its bytes. Nothing is compressed: KV hardly shrinks, and a layer should be readable in a fraction of a
    millisecond. Nothing is synced to the disk. Of a program's processes, each writes by itself.

    Args:
        path: must not exist; on a file system it appears by a rename, once it is complete.

    Raises:
        OSError, ValueError: as the file system or TensorStore report (disk full, no permission).
    """
    context = ocp.Context()
    saving = context.array.saving
    # The files that these options write serve resharding and multi-host training, and the store has its own checks.
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    saving.enable_post_merge_validation = False
    if not is_local(path):  # object storage has no renames; there a pack is complete once it has an `entries.json`
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    registry = ocp.handlers.local_registry(include_global_registry=False)
    context.checkpointables.registry = registry.add(_TreeHandler, checkpointable_name=TREE)
    with _one_at_a_time, _by_itself(context), context:
        ocp.save(path, tree)


@contextmanager
def _by_itself(context: Any) -> Iterator[None]:
    """Has this process write without the others of the program, if `jax.distributed` connected it to any.

    Orbax's saves are the work of all processes, which it has meet at barriers. It knows of some that write by
    themselves, but has even those compare the path with all others', by a program that all must run.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    this, processes = jax.process_index(), context.multiprocessing
    processes.primary_host, processes.active_processes = this, {this}
    processes.barrier_sync_key_prefix = f"cacheblend_{this}"
    _compare_paths_of_others_alone()
    _thread.writes_by_itself = True
    try:
        yield
    finally:
        _thread.writes_by_itself = False


_thread = threading.local()


@cache
def _compare_paths_of_others_alone() -> None:
    """Has Orbax compare the paths of other saves in the program, which may be all processes' work, but not of ours."""
    from orbax.checkpoint.experimental.v1._src.saving import execution  # private: only several processes need it

    compare = execution._check_directory_consistency

    def compare_others(directory: Any) -> None:
        if not getattr(_thread, "writes_by_itself", False):
            compare(directory)

    execution._check_directory_consistency = compare_others


class _TreeHandler:
    """Makes Orbax's own handler of trees, with leaves that we write."""

    def __new__(cls) -> Any:
        return ocp.handlers.PyTreeHandler(leaf_handler_registry=_Leaves())


class _Leaves:
    """Orbax's `LeafHandlerRegistry`, for numpy arrays only. Plain Orbax reads what it writes."""

    def get_all(self) -> list[tuple[type, type, type]]:
        return [(np.ndarray, np.ndarray, _OneTransaction)]

    def is_handleable(self, leaf_type: type) -> bool:
        return issubclass(leaf_type, np.ndarray)

    is_abstract_handleable = is_handleable

    def get_secondary_typestrs(self, _: type) -> list[str]:
        return ["np.ndarray"]


class _OneTransaction:
    """An Orbax `LeafHandler` that writes all arrays in one commit of the OCDBT database, and syncs nothing.

    Orbax's own makes two commits per array, syncs each four times, and merges that database into a second one.
    """

    def __init__(self, context: Any = None) -> None:
        pass

    async def serialize(self, params: Sequence[Any], serialization_context: Any) -> Awaitable[None]:
        return self._write(params, serialization_context.parent_dir)

    async def _write(self, params: Sequence[Any], directory: Any) -> None:
        base = base_spec((await directory.await_creation()).parent)
        # Blocking is fine here: Orbax runs this on a thread of its own.
        with ts.Transaction() as transaction:
            opening = [
                ts.open(spec, context=_context(), transaction=transaction)
                for param in params
                for spec in (_array_spec(base, param.name, param.value), _data_spec(base, param.name, param.value))
            ]
            arrays = [array.result() for array in opening]
            # Entries are read-only, so TensorStore need not copy them.
            writing = [
                data.write(param.value.reshape(data.shape), can_reference_source_data_indefinitely=True)
                for data, param in zip(arrays[1::2], params, strict=True)
            ]
            for write in writing:
                write.result()


def _array_spec(base: KvStoreSpec, name: str, array: np.ndarray) -> dict[str, Any]:
    return _layers_spec(base, name, array) | {"create": True}


def _layers_spec(base: KvStoreSpec, name: str, array: np.ndarray) -> dict[str, Any]:
    axes = _stored_axes(name, array)
    reordered = [] if axes == sorted(axes) else [{"name": "transpose", "configuration": {"order": axes}}]
    return _spec(base, name, array.dtype, array.shape, (1, *array.shape[1:]), reordered)


def _stored_axes(name: str, array: np.ndarray) -> list[int]:
    """Returns the order of an array's axes in its storage chunks: that of KV heads first, where they are in groups."""
    axis = head_axis(name.rpartition(".")[2]) + 1
    if num_groups(array.shape[axis]) == 1:
        return list(range(array.ndim))
    return [0, axis, *(other for other in range(1, array.ndim) if other != axis)]


def _data_spec(base: KvStoreSpec, name: str, array: np.ndarray) -> dict[str, Any]:
    """Describes the same chunks, of the same bytes; without groups of heads, by axes that spare TensorStore a copy.

    TensorStore takes a chunk with an axis of length 1 for scattered data, since that axis has stride 0, and copies it.
    Without such an axis it writes the array's own memory.
    """
    keep_metadata = {"open": True, "assume_metadata": True}  # that `_array_spec` wrote
    axes = _stored_axes(name, array)
    if axes != sorted(axes):
        return _layers_spec(base, name, array) | keep_metadata
    layers, tokens, *token = array.shape
    size = math.prod(token)
    twos = len(token)  # the axes are as many as the array's, for a chunk's name has a number for each
    block = (tokens, size // 2**twos, *[2] * twos) if size % 2**twos == 0 else (tokens, size, *[1] * twos)
    return _spec(base, name, array.dtype, (layers * tokens, *block[1:]), block) | keep_metadata


def _spec(
    base: KvStoreSpec,
    name: str,
    dtype: np.dtype,
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    reordered: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/", "target_data_file_size": DATA_FILE_BYTES},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
            "codecs": [*reordered, {"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,  # a missing layer is damage, not zeros
    }


@cache
def _context() -> ts.Context:
    return ts.Context({"file_io_sync": False})  # data lost in a power failure is a miss: every read checks


IGNORED_MESSAGES = (
    "Skipping merge of OCDBT checkpoints",  # there is nothing to merge
    "No jax.Array in TypeHandlerRegistry",  # a pack has none
    "_SignalingThread.run() raised",  # the error is raised again in our thread
)


def _is_wanted(message: logging.LogRecord) -> bool:
    return not any(text in str(message.msg) for text in IGNORED_MESSAGES)


logging.getLogger("absl").addFilter(_is_wanted)  # Orbax logs through absl
