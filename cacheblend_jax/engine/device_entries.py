"""Stored entries in the device's memory, as the store's device tier keeps them, and prefills place them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cacheblend_jax.blend.buckets import small_bucket
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.quantised_kv import StoredCache
from cacheblend_jax.store import ChunkEntry, DeviceEntry
from cacheblend_jax.store.quantise import Scales
from pallas_kernels import QuantisedKV


def on_device(entry: ChunkEntry, put: Callable[[Any], Any]) -> DeviceEntry:
    """Copies an entry to the device by `put`, padded so that chunks of many lengths share programs."""
    rows, scales = small_bucket(entry.num_tokens), entry.scales

    def padded(array: np.ndarray) -> np.ndarray:
        wider = np.zeros((array.shape[0], rows, *array.shape[2:]), array.dtype)
        wider[:, : entry.num_tokens] = array
        return wider

    k, v, *more = put([padded(x) for x in (entry.k, entry.v, *(() if scales is None else scales[1:]))])
    there = None if scales is None else Scales(scales.dtype, *more)
    return DeviceEntry(k, v, entry.num_tokens, entry.fingerprint, entry.context_ids, entry.label, there, entry.k_offset)


def placeable(chunk: PlacedChunk, kv_dtype: str | None) -> DeviceEntry | None:
    """Returns the chunk's entry on the device, if it is there as the prompt's KV is to be."""
    entry = chunk.handle.device_entry
    return entry if entry is not None and entry.kv_dtype == kv_dtype else None


def rows_to_place(chunks: Sequence[PlacedChunk], kv_dtype: str | None) -> set[int]:
    """Returns the numbers of rows of the chunks that are placed on the device."""
    return {entry.k.shape[1] for chunk in chunks if (entry := placeable(chunk, kv_dtype)) is not None}


def kv_of(entry: DeviceEntry) -> StoredCache:
    """Returns an entry's KV as programs take it."""
    scales: Any = entry.scales
    return KVCache(entry.k, entry.v) if scales is None else QuantisedKV(entry.k, entry.v, scales.k, scales.v)
