"""Delivery: brings stored KV from the host to the device, whole or layer by layer, and keeps what it needs for that.

That is the link, page-locked buffers, the threads that read, and the layers that stay on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.layer_step import blends_in_place
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.streamed import layers_wanted
from cacheblend_jax.engine.delays import PAGES_AHEAD, PAGES_ON_DEVICE, Tier, layers_read_ahead
from cacheblend_jax.engine.device_entries import kv_of, placeable
from cacheblend_jax.engine.device_layers import DeviceLayers, PlacedLayers, free_share, placement_name
from cacheblend_jax.engine.entry_locks import ENTRY_LOCKS
from cacheblend_jax.engine.entry_pages import PAGES_TOGETHER, Page, cut_into_pages, page_rows
from cacheblend_jax.engine.layer_stream import LayerStream
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import (
    READERS,
    HostRows,
    cache_of,
    copiers,
    kv_dtype_of,
    load_all,
    place_chunk,
)
from cacheblend_jax.engine.page_stream import PageStream
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.model.kv_cache import SCALES, layer_bytes
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.quantised_kv import StoredCache
from cacheblend_jax.runtime.host_buffers import ALIGNMENT, HostBuffers, aligned_empty
from cacheblend_jax.runtime.link import DeviceLink, Link
from cacheblend_jax.runtime.placing import OwnPart, placed
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store.quantise import FLOAT8, LARGEST_CODES, QuantisedRows
from pallas_kernels.target import target_of


class Delivery:
    """The way of a model's stored KV to its device, for one prefill at a time.

    Args:
        prefetch_layers: while streaming, how many layers of cached KV may be on the device at a time; of pages,
            which hold several layers, four times as many.
        link: from host memory to the device; `None`: the device's own.
        kept_bytes: of device memory for layers that stay there; `None`: a share of what is free at the first streamed
            prefill. On a CPU device, whose memory is the host's, none stay.

    Attributes:
        locks_entries: whether entries in host memory may be page-locked, so that the device reads them there.
        kv_dtypes: those of quantised KV that the device dequantises; others are dequantised on the host.

    Raises:
        CacheBlendError: a number that is not whole, or too small.
    """

    def __init__(
        self, model: Model, prefetch_layers: int, link: Link | None = None, kept_bytes: int | None = None
    ) -> None:
        if not is_whole_number(prefetch_layers, least=1):
            raise CacheBlendError(f"prefetch_layers must be a whole number of at least 1, got {prefetch_layers!r}")
        if kept_bytes is not None and not is_whole_number(kept_bytes, least=0):
            raise CacheBlendError(f"kept_bytes must be None or a whole number of at least 0, got {kept_bytes!r}")
        self.prefetch_layers = prefetch_layers
        self.locks_entries = True
        self._model = model
        self._link: Link = DeviceLink(model.placement) if link is None else link
        self._kept_bytes = kept_bytes if self._link.is_hidden else 0
        self._kept: DeviceLayers | None = None  # from the first streamed prefill on
        self._buffers: dict[str, HostBuffers] = {}  # by dtype
        target = target_of(next(iter(model.placement.device_set)))
        self.kv_dtypes = tuple(name for name in LARGEST_CODES if name != FLOAT8 or target.has_float8)
        self._copiers = copiers() if self._link.is_hidden else 1  # a CPU device computes on the same cores
        self._readers = _reader_pool()

    @property
    def host_streams(self) -> bool:
        """Whether layers go from host memory to the device beside computation."""
        return self._link.is_hidden

    def transfer(self, profile: Profile) -> Tier:
        """Returns the speed of the link: its own where it has one, else as measured for how host buffers are."""
        if self._link.bytes_per_s is not None:
            return Tier("transfer", self._link.bytes_per_s)
        return profile.transfer_from(page_locked=self.locks_pages)

    @cached_property
    def locks_pages(self) -> bool:
        """Whether host buffers are page-locked."""
        return self._link.page_lock(aligned_empty((ALIGNMENT,), np.dtype(np.uint8))) is not None

    @property
    def host_layers(self) -> int:
        """Layers that are read ahead into host memory.

        (All layers are, where a pass of the question takes them all first.)
        """
        return layers_read_ahead(self._model.config.num_layers, self.prefetch_layers)

    def kv_dtype(self, chunks: Sequence[PlacedChunk]) -> str | None:
        """Returns what the chunks' KV is on its way to the device, and there: see `kv_dtype_of`."""
        return kv_dtype_of(chunks, self.kv_dtypes, has_key_bias=self._model.config.has_key_bias)

    def layer_bytes(self, num_keys: int, kv_dtype: str | None) -> int:
        """Returns the bytes of one layer's K and V of so many keys on each device."""
        return layer_bytes(self._model.config, num_keys, kv_dtype) // self._model.kv_shares

    def load(self, plan: Plan, chunks: Sequence[PlacedChunk], trace: Trace | None = None) -> StoredCache:
        """Assembles all stored KV in place, on the device; the prefill overwrites the rows of forced tokens.

        Chunks that are on the device already stay there; if all are, nothing is transferred. But those that are
        quantised where the others are not come by way of the host.
        """
        kv_dtype = self.kv_dtype(chunks)
        elsewhere = [chunk for chunk in chunks if placeable(chunk, kv_dtype) is None]
        cached = self._whole(plan.cache_length, elsewhere, kv_dtype, trace) if elsewhere or not chunks else None
        began = time.perf_counter()
        for chunk in chunks:
            if (entry := placeable(chunk, kv_dtype)) is not None:
                kv = placed(kv_of(entry), self._model.cache_placement)  # another engine's may be on another device
                run = self._model.runner
                cached = place_chunk(run, cached, kv, chunk.start, entry.num_tokens, plan.cache_length)
        jax.block_until_ready(cached)
        if trace is not None and len(elsewhere) < len(chunks):
            trace.add("transfer", "chunks on the device", -1, began, time.perf_counter())
        assert cached is not None  # a chunk was placed, or the host buffers were transferred
        return cached

    def _whole(
        self, num_keys: int, chunks: Sequence[PlacedChunk], kv_dtype: str | None, trace: Trace | None = None
    ) -> StoredCache:
        """Reads all layers of the chunks to their places among `num_keys` keys, and puts them on the device.

        Raises:
            LostChunkError: a chunk could not be read.
        """
        k, v = self._host_rows(self._model.config.num_layers, num_keys, kv_dtype)
        load_all(chunks, k, v, self._readers, trace, threads=self._copiers)
        began = time.perf_counter()
        cached = jax.block_until_ready(cache_of(self._put((k, v), self._model.cache_placement, heads_axis=2)))
        if trace is not None:
            trace.add("transfer", "all layers", -1, began, time.perf_counter())
        return cached

    def stream(
        self,
        plan: Plan,
        chunks: Sequence[PlacedChunk],
        needed: int,
        trace: Trace | None,
        *,
        first: int,
        layers: Sequence[jax.Array],
    ) -> LayerStream | PageStream:
        """Begins to load the layers of the chunks, in the order in which a streamed prefill takes them.

        Args:
            needed: bytes of device memory that the prefill's programs take.
            first: see `first_layer_read`.
            layers: the layers' numbers, each an array on the device.

        Raises:
            CacheBlendError: a thread cannot be started; nothing is left running.
        """
        kv_dtype = self.kv_dtype(chunks)
        in_pages = self.takes_pages(plan, kv_dtype) and all(chunk.is_in_memory for chunk in chunks)
        kept = self._layers_kept(plan, chunks, needed, copied=in_pages)
        if kept.room:  # layers stay whole: a prefill of another mode may read all of their tokens
            first = 0
        if in_pages and (pages := self._pages(chunks, first, kept)) is not None:
            return PageStream(
                pages,
                first,
                layers,
                page_rows(self._model.config),
                plan.cache_length,
                partial(self._link.put, placement=self._model.placement),
                self._model.runner,
                trace,
                ahead=PAGES_AHEAD * self.prefetch_layers,
                room=PAGES_ON_DEVICE * self.prefetch_layers,
                kept=kept,
            )
        config, on_device = self._model.config, self.prefetch_layers
        host_layers = config.num_layers if plan.needs("question_mass") else self.host_layers  # no layer is read twice
        return LayerStream(
            chunks,
            layers_wanted(plan, config.num_layers),
            self._host_rows(host_layers, plan.cache_length, kv_dtype),
            on_device,
            partial(self._put, placement=self._model.layer_placement, heads_axis=1),
            self._readers,
            trace,
            threads=self._copiers,
            # One layer's step is running, and one waits for its own: the others may be sent before the next is.
            sent_ahead=max(on_device - 2, min(1, on_device - 1)) if self._link.is_ordered else 0,
            kept=kept,
        )

    def takes_pages(self, plan: Plan, kv_dtype: str | None) -> bool:
        """Returns whether the device may read entries where they lie in host memory, for a plan with such stored KV."""
        return self.reads_entries and kv_dtype is None and not plan.nothing_cached

    @property
    def reads_entries(self) -> bool:
        """Whether the device can read entries where they lie in host memory, if they are not quantised."""
        model = self._model
        can = blends_in_place(model.platform) and len(model.placement.device_set) == 1 and self.locks_pages
        return self.locks_entries and can

    def abstract_pages(self) -> tuple[tuple[tuple[Any, Any], ...], jax.ShapeDtypeStruct]:
        """Returns the shapes of what is sent of pages that are placed together."""
        config, put = self._model.config, self._model.placement
        shape = page_rows(config), config.num_kv_heads, config.head_dim
        rows: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=put)
        places = jax.ShapeDtypeStruct((PAGES_TOGETHER, 4), jnp.int32, sharding=put)
        return ((rows, rows),) * PAGES_TOGETHER, places

    def _pages(self, chunks: Sequence[PlacedChunk], first: int, kept: PlacedLayers) -> list[Page] | None:
        """Returns the pages of the layers that the device does not keep, page-locked; `None` where it takes none."""
        pages, rows = cut_into_pages(chunks, self._model.config, first, kept.layers), page_rows(self._model.config)
        if pages is None:
            return None
        read_there = [page.entry for page in pages if not page.is_copied(rows)]
        return pages if ENTRY_LOCKS.lock(read_there, self._link.page_lock) else None

    def num_kept(self, plan: Plan, chunks: Sequence[PlacedChunk]) -> int:
        """Returns how many layers of the chunks' KV a streamed prefill finds on the device."""
        name = placement_name(chunks, plan.cache_length, self.kv_dtype(chunks))
        return 0 if self._kept is None else self._kept.num_kept(name)

    def forget(self, plan: Plan, chunks: Sequence[PlacedChunk]) -> None:
        """Drops what a streamed prefill of the chunks has left on the device, if it has left anything."""
        if self._kept is not None:
            self._kept.forget(placement_name(chunks, plan.cache_length, self.kv_dtype(chunks)))

    def give_way(self) -> bool:
        """Drops the layers that stayed on the device; returns whether there were any."""
        return self._kept is not None and self._kept.drop()

    def close(self) -> None:
        """Ends the threads and drops layers that stayed; a later prefill begins anew. Not while one is running."""
        self._kept = None
        self._readers.shutdown()
        self._readers = _reader_pool()

    def _layers_kept(self, plan: Plan, chunks: Sequence[PlacedChunk], needed: int, *, copied: bool) -> PlacedLayers:
        if self._kept is None:
            devices = list(self._model.placement.addressable_devices)
            self._kept = DeviceLayers(free_share(devices, needed) if self._kept_bytes is None else self._kept_bytes)
        config, length, kv_dtype = self._model.config, plan.cache_length, self.kv_dtype(chunks)
        name = placement_name(chunks, length, kv_dtype)
        return self._kept.of(name, self.layer_bytes(length, kv_dtype), config.num_layers, copied=copied)

    def _host_rows(self, num_layers: int, num_keys: int, kv_dtype: str | None) -> tuple[HostRows, HostRows]:
        """Returns buffers for K and V, of the heads that this host reads; with a `kv_dtype`, for codes and scales."""
        config = self._model.config
        shape = num_layers, num_keys, len(self._model.own_kv_heads), config.head_dim
        if kv_dtype is None:
            return self._pair(config.dtype, shape)
        k, v = self._pair(kv_dtype, shape)
        k_scales, v_scales = self._pair(SCALES.name, shape[:-1])
        return QuantisedRows(k, k_scales), QuantisedRows(v, v_scales)

    def _put(self, rows: tuple[HostRows, HostRows], placement: jax.sharding.Sharding, heads_axis: int) -> Any:
        """Puts what `_host_rows` gave, or a layer of it, on the devices."""
        if not self._model.spans_hosts:
            return self._link.put(rows, placement)
        own = OwnPart(heads_axis, self._model.own_kv_heads, self._model.config.num_kv_heads)
        return self._link.put(rows, placement, own)

    def _pair(self, dtype: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        if dtype not in self._buffers:
            self._buffers[dtype] = HostBuffers(jnp.dtype(dtype), self._link.page_lock)
        return self._buffers[dtype].arrays(shape)


def _reader_pool() -> ThreadPoolExecutor:
    most = max(READERS, copiers())  # each starts when it is needed
    return ThreadPoolExecutor(most, thread_name_prefix="cacheblend-read")
