"""Calibration: measures a model's layer steps and a store's tiers on this machine, and fits the estimators."""

from __future__ import annotations

import argparse
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import nnls

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.controller import ComputeModel, Tier, layer_sizes
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.loading import READERS, Placed, Staging, load_all
from cacheblend_jax.engine.profile import ASSUMED_DISK, Profile, default_path, device_kind, store_name
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.model import Model
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore, is_local, located
from cacheblend_jax.store.pins import make_and_hold

LENGTHS = (512, 1024, 2048, 4096)
RATIOS = (0.15, 0.5)
CHUNKS = 8
QUESTION_TOKENS = 32
PROBE_TOKENS = 512  # of each chunk that tiers are measured with; beside it chunks of one token give the latency
PROBE_CHUNKS = 4
NOT_USED = "not used: nothing is on a disk"


def calibrate(
    model: Model,
    open_store: Callable[[], Any],
    *,
    lengths: Sequence[int] = LENGTHS,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 3,
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
) -> Profile:
    """Measures and fits; a minute or more, most of it compilation.

    Args:
        open_store: opens the store whose tiers are measured; called again so that nothing is in its memory yet. Probes
            are left in it: give a directory of their own, on the same storage.
        lengths: tokens in chunks; those beyond the model's maximum are left out.
        progress: wraps long loops, with what they do.

    Raises:
        CacheBlendError: no length fits the model, or the store keeps nothing.
    """
    if short := [tokens for tokens in lengths if tokens < CHUNKS]:
        raise CacheBlendError(f"lengths must be at least {CHUNKS} tokens, one a chunk; got {short[0]}")
    fitting = [tokens for tokens in lengths if tokens + QUESTION_TOKENS <= model.config.max_positions]
    if not fitting:
        raise CacheBlendError(
            f"no length of {list(lengths)} fits the model, which takes at most {model.config.max_positions} tokens"
        )
    compute, fit = fit_compute(model, fitting, ratios, repeats, progress)
    with closing(open_store()) as store:
        directory = store.directory
    tiers, transfer, page_cache = measure_tiers(model, open_store, repeats)
    fit |= {"page_cache": page_cache}
    return Profile(model.fingerprint, device_kind(model), store_name(directory), compute, tiers, transfer, fit)


def random_prompt(model: Model, tokens: int, seed: int = 0, chunks: int = CHUNKS) -> Prompt:
    """A prompt of equal chunks of random ids."""
    rng = np.random.default_rng([tokens, seed])

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, model.config.vocab_size, size).astype(np.int32)

    return Prompt([], [ids(len(part)) for part in np.array_split(np.arange(tokens), chunks)], ids(QUESTION_TOKENS))


def fit_compute(
    model: Model,
    lengths: Sequence[int],
    ratios: Sequence[float],
    repeats: int,
    progress: Callable[[Iterable, str], Iterable],
) -> tuple[ComputeModel, dict[str, Any]]:
    """Times each layer of streamed prefills and fits what they are linear in, by non-negative least squares."""
    store = ChunkStore(host_bytes=2**40)
    sizes: list[Sequence[float]] = []
    seconds: list[float] = []
    others: list[float] = []
    cases = [(tokens, ratio) for tokens in lengths for ratio in ratios]
    for tokens, ratio in progress(cases, "layer steps"):
        prompt = random_prompt(model, tokens)
        with Engine(model, store, BlendConfig(ratio), executor="streamed") as engine:
            engine.precompute(prompt)
            plan = engine.prefill(prompt).plan
            runs = [_timed_layers(engine, prompt) for _ in range(repeats)]
        sizes += layer_sizes(plan)
        seconds += np.median([layers for layers, _ in runs], axis=0).tolist()
        others += [other for _, other in runs]
        store.clear()
    design, target = np.asarray(sizes), np.asarray(seconds)
    # Between absolute errors, where long layers alone count, and relative ones, where the jitter of short ones does.
    weights = 1 / np.sqrt(target)
    coefficients, _ = nnls(design * weights[:, None], target * weights)
    errors = np.abs(design @ coefficients / target - 1)
    fit = {
        "layer_steps": len(target),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "layers": [{"sizes": list(x), "seconds": y} for x, y in zip(sizes, seconds, strict=True)],
    }
    layer, key, projected, attending, visible = coefficients.tolist()
    return ComputeModel(layer, key, projected, attending, visible, statistics.median(others)), fit


def _timed_layers(engine: Engine, prompt: Prompt) -> tuple[list[float], float]:
    """Seconds of each layer's step, and of the rest of the request."""
    trace = Trace()
    out = engine.prefill(prompt, trace=trace)
    spans = trace.lane("compute")
    layers = [span.ended - span.began for span in spans]
    return layers, max(out.stats.ttft_s - (spans[-1].ended - spans[0].began), 0.0)


def measure_tiers(model: Model, open_store: Callable[[], Any], repeats: int) -> tuple[dict[str, Tier], Tier, str]:
    """Measures host memory, the store's slower tier if it has one, and the way to the device.

    The store is opened again before each measurement and the operating system's cache of its files dropped
    (`posix_fadvise(DONTNEED)`, where there is one), so that a disk is measured cold. Returns also what was done.
    """
    memory = ChunkStore(host_bytes=2**40)
    tiers = {"host": _measured_tier(model, lambda: memory, "host", repeats)[0], "disk": ASSUMED_DISK}
    page_cache = NOT_USED
    with closing(open_store()) as store:
        on_disk = store.directory is not None
    if on_disk:
        tier, page_cache = _measured_tier(model, open_store, "disk", repeats)
        tiers[tier.name] = tier
    return tiers, _measured_transfer(model, repeats), page_cache


def _measured_tier(model: Model, open_store: Callable[[], Any], name: str, repeats: int) -> tuple[Tier, str]:
    """Puts probes into a store and reads them: large ones for the throughput, chunks of one token for the latency."""
    config = model.config
    tokens = min(PROBE_TOKENS, config.max_positions - 8)
    prefix = random_prompt(model, 8 * CHUNKS, 1).suffix[:4]
    large = [random_prompt(model, tokens, seed, 1).chunks[0] for seed in range(1, PROBE_CHUNKS + 1)]
    small = [ids[:1] for ids in large]
    with closing(open_store()) as store, Engine(model, store, executor="resident") as engine:
        keys = [engine.precompute(chunks, prefix=prefix) for chunks in (large, small)]
    shape = (config.num_layers, PROBE_CHUNKS * tokens, config.num_kv_heads, config.head_dim)
    buffers = Staging(np.dtype(model.config.dtype)).arrays(shape)
    seconds, page_cache = np.zeros((repeats, 2)), NOT_USED
    for repeat in range(repeats):
        for which, size in enumerate((tokens, 1)):
            with ExitStack() as handles:
                store = handles.enter_context(closing(open_store()))
                if store.directory is not None:
                    page_cache = drop_page_cache(store.directory)
                found = [store.open(key) for key in keys[which]]
                chunks = [handles.enter_context(chunk) for chunk in found if chunk is not None]
                if len(chunks) < len(found):
                    raise CacheBlendError(
                        f"{len(found) - len(chunks)} of {len(found)} probes of {size} tokens could not be stored in "
                        f"{store.directory or 'memory'}; is there room, and the right to write?"
                    )
                name = chunks[0].tier
                placed = [Placed("", i * size, (i + 1) * size, chunk) for i, chunk in enumerate(chunks)]
                num_bytes = sum(chunk.num_bytes for chunk in chunks)
                with ThreadPoolExecutor(READERS) as readers:
                    began = time.perf_counter()
                    load_all(placed, *buffers, readers)
                    seconds[repeat, which] = time.perf_counter() - began
            if which == 0:
                large_bytes = num_bytes
    large_s, small_s = (float(np.median(column)) for column in seconds.T)
    reads = -(-PROBE_CHUNKS * config.num_layers // READERS)
    latency_s = small_s / reads
    bytes_per_s = large_bytes / max(large_s - small_s, large_s / 10)
    return Tier(name, bytes_per_s, latency_s), page_cache


def _measured_transfer(model: Model, repeats: int) -> Tier:
    config = model.config
    shape = (config.max_positions if config.max_positions < 4096 else 4096, config.num_kv_heads, config.head_dim)
    pair = Staging(np.dtype(config.dtype)).arrays(shape)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(pair, model.placement))
        seconds.append(time.perf_counter() - began)
    return Tier("transfer", 2 * pair[0].nbytes / statistics.median(seconds[1:]))


def drop_page_cache(directory: Path | str) -> str:
    """Asks the operating system to forget the files under a directory; returns how, or that it cannot be done."""
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


def without_details(profile: Profile) -> dict[str, Any]:
    """The profile as a report: without the single measurements."""
    fit = {name: value for name, value in profile.fit.items() if name != "layers"}
    return asdict(replace(profile, fit=fit))


@contextmanager
def _place_for_probes(directory: str | None) -> Iterator[str | None]:
    """A place on the same storage as a store, which its entries know nothing of; removed afterwards.

    It is one of writing: what a killed calibration leaves goes when the store is opened next.
    """
    if directory is None:
        yield None
        return
    place = located(directory) / "writing" / f"calibration-{uuid.uuid4().hex}"
    with make_and_hold(place) if is_local(directory) else nullcontext():
        try:
            yield os.fspath(place / "store")
        finally:
            if place.exists():
                place.rmtree()


def run_calibrate(
    parsed: argparse.Namespace, model: Model, progress: Callable[[Iterable, str], Iterable]
) -> dict[str, Any]:
    """The command: calibrates, prints what was found, saves the profile; returns what `--json` writes."""
    directory = parsed.store
    if directory is not None and is_local(directory) and not (parent := located(directory).parent).is_dir():
        raise CacheBlendError(f"cannot use --store {directory}: {parent} is not a directory; is it mounted?")
    for ratio in parsed.ratios:
        BlendConfig(ratio)
    path = parsed.out or default_path(model, directory)
    with _place_for_probes(directory) as probes:
        profile = calibrate(
            model,
            lambda: ChunkStore(probes),
            lengths=parsed.lengths,
            ratios=parsed.ratios,
            repeats=parsed.repeats,
            progress=progress,
        )
    profile = replace(profile, store=store_name(directory))
    profile.save(path)
    compute, fit = profile.compute, profile.fit
    print(
        f"a layer takes {compute.layer_s * 1e3:.3f} ms + {compute.key_s * 1e6:.3f} us/key + "
        f"{compute.projected_s * 1e6:.3f} us/row projected + {compute.attending_s * 1e6:.3f} us/row attending + "
        f"{compute.visible_s * 1e9:.3f} ns/pair; a request {compute.request_s * 1e3:.1f} ms"
    )
    print(
        f"fit over {fit['layer_steps']} layer steps: error {fit['median_error']:.1%} in the median, "
        f"{fit['worst_error']:.1%} at worst"
    )
    for tier in (*profile.tiers.values(), profile.transfer):
        assumed = " (assumed, not measured)" if tier is ASSUMED_DISK else ""
        print(f"{tier.name}: {tier.bytes_per_s / 1e9:.2f} GB/s, {tier.latency_s * 1e6:.0f} us a read{assumed}")
    print(f"page cache: {fit['page_cache']}\nsaved {path}")
    return without_details(profile) | {"saved": str(path)}
