"""The one place that uses `orbax.checkpoint.v1`, a young API: it writes a tree so that layers can be read alone."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp


def save_tree(path: Any, tree: dict[str, Any]) -> None:
    """Writes nested dicts of arrays `[layers, …]` as an Orbax checkpoint, each layer a storage chunk of its own.

    Uncompressed: KV hardly compresses, and a layer is to be read in a fraction of a millisecond. `path` must not exist;
    it appears, complete and synced, when all is written (on a file system by a rename).

    Raises:
        OSError, ValueError: whatever the file system or TensorStore say (disk full, no permission).
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.scoped_storage_options_creator = _one_chunk_a_layer
    # The files that these write serve resharding and multi-host training; the store checks what it wrote itself.
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    saving.enable_post_merge_validation = False
    context.memory.deepcopy_host_arrays = False  # entries are read-only
    with context:
        ocp.save(path, tree)


def _one_chunk_a_layer(_: Any, array: np.ndarray) -> Any:
    options = ocp.options.ArrayOptions.Saving.StorageOptions()
    options.chunk_byte_size = array.nbytes // array.shape[0]
    options.shard_axes = (0,)
    return options


def _is_news(message: logging.LogRecord) -> bool:
    text = str(message.msg)
    return "target_byte_size too small" not in text and "_SignalingThread.run() raised" not in text


# Small chunks are what the store wants, and Orbax warns of each. What its threads raise it raises here again.
logging.getLogger("absl").addFilter(_is_news)
