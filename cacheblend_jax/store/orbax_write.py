"""The one place that uses `orbax.checkpoint.v1`, a young API: it writes a tree so that layers can be read alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from cacheblend_jax.store.location import is_local
from cacheblend_jax.store.pack import base_spec

TREE = "state"  # Orbax's name of the tree in a checkpoint
DATA_FILE_BYTES = 2**25  # a pack's data files are written several at once


def save_tree(path: Any, tree: dict[str, Any]) -> None:
    """Writes nested dicts of arrays `[layers, tokens, kv_heads, head_dim]` as an Orbax checkpoint.

    Each layer is a storage chunk of its own.

    Uncompressed: KV hardly compresses, and a layer is to be read in a fraction of a millisecond. `path` must not exist;
    on a file system it appears, complete, by a rename. Nothing is synced.

    Raises:
        OSError, ValueError: whatever the file system or TensorStore say (disk full, no permission).
    """
    context = ocp.Context()
    saving = context.array.saving
    # The files that these write serve resharding and multi-host training; the store checks what it wrote itself.
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    saving.enable_post_merge_validation = False
    if not is_local(path):  # object storage has no rename; the store counts a pack by `entries.json`, written last
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    registry = ocp.handlers.local_registry(include_global_registry=False)
    context.checkpointables.registry = registry.add(_TreeHandler, checkpointable_name=TREE)
    with context:
        ocp.save(path, tree)


class _TreeHandler:
    """Orbax's own handler of trees, but for who writes the leaves."""

    def __new__(cls) -> Any:
        return ocp.handlers.PyTreeHandler(leaf_handler_registry=_Leaves())


class _Leaves:
    """Orbax's `LeafHandlerRegistry` of numpy arrays alone. Others read them as it reads its own."""

    def get_all(self) -> list[tuple[type, type, type]]:
        return [(np.ndarray, np.ndarray, _OneTransaction)]

    def is_handleable(self, leaf_type: type) -> bool:
        return issubclass(leaf_type, np.ndarray)

    is_abstract_handleable = is_handleable

    def get_secondary_typestrs(self, _: type) -> list[str]:
        return ["np.ndarray"]


class _OneTransaction:
    """Orbax's `LeafHandler` which writes all arrays by one commit of the OCDBT database, and syncs nothing.

    Orbax's own makes two commits an array, each synced four times, to a database that another one refers to then.
    """

    def __init__(self, context: Any = None) -> None:
        pass

    async def serialize(self, params: Sequence[Any], serialization_context: Any) -> Awaitable[None]:
        return self._write(params, serialization_context.parent_dir)

    async def _write(self, params: Sequence[Any], directory: Any) -> None:
        base = base_spec((await directory.await_creation()).parent)
        # Orbax runs this on a thread of its own: what blocks it blocks nobody.
        with ts.Transaction() as transaction:
            opening = [
                ts.open(spec, context=_context(), transaction=transaction)
                for param in params
                for spec in (_array_spec(base, param.name, param.value), _data_spec(base, param.name, param.value))
            ]
            arrays = [array.result() for array in opening]
            # Entries are read-only: no copy is needed.
            writing = [
                data.write(param.value.reshape(data.shape), can_reference_source_data_indefinitely=True)
                for data, param in zip(arrays[1::2], params, strict=True)
            ]
            for write in writing:
                write.result()


def _array_spec(base: Any, name: str, array: np.ndarray) -> dict[str, Any]:
    return _spec(base, name, array.dtype, array.shape, (1, *array.shape[1:])) | {"create": True}


def _data_spec(base: Any, name: str, array: np.ndarray) -> dict[str, Any]:
    """The same chunks with the same bytes, by other axes: TensorStore copies a chunk that has an axis of length 1.

    Its stride is 0 then, which passes for scattered data; without such an axis what is written is the array itself.
    """
    layers, tokens, *token = array.shape
    size = math.prod(token)
    block = (tokens, size // 4, 2, 2) if size % 4 == 0 else (tokens, size, 1, 1)
    spec = _spec(base, name, array.dtype, (layers * tokens, *block[1:]), block)
    return spec | {"open": True, "assume_metadata": True}  # what `_array_spec` writes stays


def _spec(base: Any, name: str, dtype: np.dtype, shape: Sequence[int], chunk_shape: Sequence[int]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/", "target_data_file_size": DATA_FILE_BYTES},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,  # a layer that is missing is damage, not zeros
    }


@cache
def _context() -> ts.Context:
    return ts.Context({"file_io_sync": False})  # what a power failure takes is a miss: every read checks


NO_NEWS = (
    "Skipping merge of OCDBT checkpoints",  # there is nothing to merge
    "No jax.Array in TypeHandlerRegistry",  # a pack has none
    "_SignalingThread.run() raised",  # what Orbax's threads raise it raises here again
)


def _is_news(message: logging.LogRecord) -> bool:
    return not any(text in str(message.msg) for text in NO_NEWS)


logging.getLogger("absl").addFilter(_is_news)
