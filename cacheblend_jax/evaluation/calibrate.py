"""`calibrate`: what the controller decides by, measured: a model's layer steps and a store's tiers on this machine."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.profile import Profile, device_kind, store_name
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.layer_times import fit_compute
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.prompts import CHUNKS, QUESTION_TOKENS
from cacheblend_jax.evaluation.tier_speeds import measure_tiers
from cacheblend_jax.model import Model
from cacheblend_jax.store import ChunkStore, is_local, located
from cacheblend_jax.store.pins import make_and_hold

LENGTHS = (512, 1024, 2048, 4096)
RATIOS = (0.15, 0.5)


def calibrate(
    model: Model,
    directory: str | Path | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 3,
    progress: Progress = no_progress,
) -> Profile:
    """Measures and fits; takes a minute or more, most of it compilation.

    Engines find the profile if it is saved under its `default_path`.

    Args:
        directory: of the store whose disk is measured, a path or a URL, made if missing; `None`: memory only. What is
            stored there stays as it is.
        lengths: of prompts, in tokens of chunks; those beyond what the model takes are left out.
        ratios: recompute ratios.
        repeats: runs of each.

    Raises:
        CacheBlendError: no length fits the model, a ratio is out of its range, or the directory keeps nothing.
    """
    if directory is not None and is_local(directory) and not (parent := located(directory).parent).is_dir():
        raise CacheBlendError(f"cannot use --store {directory}: {parent} is not a directory; is it mounted?")
    for ratio in ratios:
        BlendConfig(ratio)  # checks it before any work
    lengths = _lengths_that_fit(model, lengths)
    with _place_for_probes(directory) as probes:
        compute, fit = fit_compute(model, lengths, ratios, repeats=repeats, progress=progress)
        speeds = measure_tiers(model, lambda: ChunkStore(probes), repeats=repeats)
    measured = compute, speeds.tiers, speeds.transfer, fit | {"page_cache": speeds.page_cache}, speeds.pageable
    return Profile(model.fingerprint, device_kind(model), store_name(directory), *measured)


def _lengths_that_fit(model: Model, lengths: Sequence[int]) -> list[int]:
    if short := [tokens for tokens in lengths if tokens < CHUNKS]:
        raise CacheBlendError(f"lengths must be at least {CHUNKS} tokens, one a chunk; got {short[0]}")
    longest = model.config.max_positions
    fitting = [tokens for tokens in lengths if tokens + QUESTION_TOKENS <= longest]
    if not fitting:
        raise CacheBlendError(f"no length of {list(lengths)} fits the model, which takes at most {longest} tokens")
    return fitting


@contextmanager
def _place_for_probes(directory: str | Path | None) -> Iterator[str | None]:
    """A store of its own on the same storage as `directory`, outside its entries; removed afterwards.

    It stands among the store's unfinished writes: what a killed calibration leaves is removed when the store is opened
    next.
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
