"""How fast stored KV comes from each tier, and how fast it goes to the device: measured with probes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cacheblend_jax.engine.delays import Tier
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.layout import NO_CONTEXT, PlacedChunk
from cacheblend_jax.engine.loading import READERS, copiers, load_all
from cacheblend_jax.engine.profile import ASSUMED_DISK
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.prompts import random_prompt
from cacheblend_jax.model import Model
from cacheblend_jax.runtime.host_buffers import HostBuffers, aligned_empty
from cacheblend_jax.runtime.link import DeviceLink, Link
from cacheblend_jax.store import ChunkStore, is_local

PROBE_CHUNKS = 4
PROBE_TOKENS = 512  # of each chunk that gives the throughput; chunks of one token give the latency
TRANSFER_KEYS = 4096  # of a layer that is handed to the device
TRANSFER_LAYERS = 4  # on their way at a time, as while layers are streamed
NO_DISK = "not used: nothing is on a disk"


class TierSpeeds(NamedTuple):
    """What was measured of a store.

    Attributes:
        tiers: `host`, and `disk` (or what the store's slower tier is called); by name.
        transfer: from host memory to the device: from page-locked memory, where the device has it.
        pageable: from other host memory; `None` where all memory is alike.
        page_cache: whether files were read cold.
    """

    tiers: dict[str, Tier]
    transfer: Tier
    pageable: Tier | None
    page_cache: str


def measure_tiers(model: Model, open_store: Callable[[], Any], *, repeats: int = 3) -> TierSpeeds:
    """Measures host memory, the store's slower tier if it has one, and the way to the device.

    The store is opened again before each reading, and the operating system's cache of its files dropped where it can
    be, so that a disk is measured cold.

    Args:
        open_store: opens the store, with nothing of it in memory. Probes are left in it.

    Raises:
        CacheBlendError: the store keeps nothing.
    """
    with ChunkStore(host_bytes=2**40) as memory:
        host, _ = _measured_tier(model, lambda: memory, repeats)
    tiers = {host.name: host, ASSUMED_DISK.name: ASSUMED_DISK}
    page_cache = NO_DISK
    with closing(open_store()) as store:
        on_disk = store.directory is not None
    if on_disk:
        disk, page_cache = _measured_tier(model, open_store, repeats)
        tiers[disk.name] = disk
    return TierSpeeds(tiers, *_measured_transfers(model, DeviceLink(model.placement), repeats), page_cache)


def _measured_tier(model: Model, open_store: Callable[[], Any], repeats: int) -> tuple[Tier, str]:
    """Stores probes and reads them again: large ones for the throughput, chunks of one token for the latency."""
    config = model.config
    tokens = min(PROBE_TOKENS, config.max_positions - 8)
    prompts = [random_prompt(config.vocab_size, tokens, chunks=1, seed=seed + 1) for seed in range(PROBE_CHUNKS)]
    large = [prompt.chunks[0] for prompt in prompts]
    small = [ids[:1] for ids in large]
    with closing(open_store()) as store, Engine(model, store, executor="resident") as engine:
        keys = [engine.precompute(chunks, prefix=prompts[0].suffix[:4]) for chunks in (large, small)]
    shape = (config.num_layers, PROBE_CHUNKS * tokens, config.num_kv_heads, config.head_dim)
    buffers = HostBuffers(np.dtype(config.dtype)).arrays(shape)
    large_runs = []
    small_runs = []
    threads = copiers() if DeviceLink(model.placement).is_hidden else 1  # as a prefill copies
    for _ in range(repeats):
        large_runs.append(_read_probes(open_store, keys[0], tokens, buffers, threads))
        small_runs.append(_read_probes(open_store, keys[1], 1, buffers, threads))
    large_s, small_s = (statistics.median(run.seconds for run in runs) for runs in (large_runs, small_runs))
    rounds = -(-PROBE_CHUNKS * config.num_layers // READERS)  # of reads at the same time
    last = large_runs[-1]
    throughput = last.num_bytes / max(large_s - small_s, large_s / 10)
    return Tier(last.tier, throughput, small_s / rounds), last.page_cache


class _Reading(NamedTuple):
    seconds: float
    num_bytes: int
    tier: str
    page_cache: str


def _read_probes(
    open_store: Callable[[], Any],
    keys: Sequence[str],
    tokens: int,
    buffers: tuple[np.ndarray, np.ndarray],
    threads: int,
) -> _Reading:
    """Reads stored probes, of so many tokens each, into K's and V's buffer; opening them is not timed."""
    with ExitStack() as handles:
        store = handles.enter_context(closing(open_store()))
        page_cache = NO_DISK if store.directory is None else drop_page_cache(store.directory)
        found = [store.open(key) for key in keys]
        chunks = [handles.enter_context(chunk) for chunk in found if chunk is not None]
        if len(chunks) < len(found):
            raise CacheBlendError(
                f"{len(found) - len(chunks)} of {len(found)} probes of {tokens} tokens could not be stored in "
                f"{store.directory or 'memory'}; is there room, and the right to write?"
            )
        ids = np.zeros(tokens, np.int32)
        placed = [PlacedChunk("", "", NO_CONTEXT, ids, i * tokens, stored=chunk) for i, chunk in enumerate(chunks)]
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        with ThreadPoolExecutor(max(READERS, threads)) as readers:
            began = time.perf_counter()
            load_all(placed, *buffers, readers, threads=threads)
            seconds = time.perf_counter() - began
        return _Reading(seconds, num_bytes, chunks[0].tier, page_cache)


def _measured_transfers(model: Model, link: Link, repeats: int) -> tuple[Tier, Tier | None]:
    """Measures page-locked memory, and pageable memory; where none can be page-locked, this alone."""
    config, placement = model.config, model.groups[0].layer_placement  # where one prefill takes them
    keys = min(config.max_positions, TRANSFER_KEYS)
    buffer = aligned_empty((TRANSFER_LAYERS, 2, keys, config.num_kv_heads, config.head_dim), np.dtype(config.dtype))
    buffer[:] = 0

    def measured(name: str) -> Tier:
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready([link.put((layer[0], layer[1]), placement) for layer in buffer])
            seconds.append(time.perf_counter() - began)
        return Tier(name, buffer.nbytes / statistics.median(seconds[1:]))  # the first one warms up

    pageable = measured("pageable")
    if (lock := link.page_lock(buffer)) is None:
        return replace(pageable, name="transfer"), None
    try:
        return measured("transfer"), pageable
    finally:
        lock.release()


def drop_page_cache(directory: Any) -> str:
    """Asks the operating system to forget the files under a path or URL; returns how, or why it cannot be done."""
    if not is_local(directory):
        return "cold: object storage"
    if not hasattr(os, "posix_fadvise"):
        return "warm: this system has no posix_fadvise"
    for path in Path(directory).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return "cold: dropped by posix_fadvise(DONTNEED)"
