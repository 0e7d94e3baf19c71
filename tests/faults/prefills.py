"""Prefills that are drawn at random, alone and by several threads at a time, against a reference in float64."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from conftest import FAMILIES, SHAPE, family_model, relative_error

import cacheblend_jax as cb
from faults import require
from faults.reference import Reference

BUCKETS = (128,)  # every prompt and every chunk is padded to it, so that there are few programs
BLENDS = [(0.0, "hkvd"), (0.15, "hkvd"), (0.5, "hkvd"), (1.0, "hkvd"), (0.15, "query"), (0.3, "cross"), (0.3, "random")]
ROUNDS_A_SETTING = 12  # each setting has programs of its own, and compiling them takes most of the time
TOLERANCE = 1e-4  # float32 against float64; a wrong token, place or layer is off by 1e-2 and more
HOST_BYTES = 60_000  # of a few chunks: others come from the disk


def fuzz(
    directory: Path,
    rounds: Iterable[int],
    seed: int = 0,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    blends: Sequence[tuple[float, str]] = BLENDS,
    executors: Sequence[str] = ("resident", "streamed"),
) -> dict[str, int]:
    """Runs one drawn prefill in each round, some of whose chunks are stored: logits and KV are the reference's."""
    rng, counts = random.Random(seed), collections.Counter(prefills=0, hits=0, misses=0)
    with _Engines(directory) as engines:
        for round_ in rounds:
            if round_ % ROUNDS_A_SETTING == 0:
                family = rng.choice(families)
                engine = engines.get(family, *rng.choice(blends), rng.choice(executors))
            prompt, mode = draw_prompt(rng), rng.choice(["full", "prefix", "reuse", "blend", "blend", "blend"])
            if rng.random() < 0.6:
                engine.precompute(rng.sample(prompt.chunks, rng.randint(0, len(prompt.chunks))), prefix=prompt.prefix)
            out = engine.prefill(prompt, mode)
            error = error_of(out, prompt, engines.reference(family))
            require(error < TOLERANCE, f"round {round_}: {family}, {mode}, {engine.blend}: relative error {error:.2g}")
            counts.update(prefills=1, hits=out.stats.hits, misses=out.stats.misses)
            if rng.random() < 0.5:
                engine.flush()
    return dict(counts)


def threads(
    directory: Path, rounds: Iterable[int], seed: int = 0, num_threads: int = 4, family: str = "llama3"
) -> dict[str, int]:
    """Threads share an engine and chunks: what must not depend on the store equals a serial run, else the reference.

    The engine's store has room for few of the chunks, in memory and on disk.
    """
    rng, counts = random.Random(seed), collections.Counter(prefills=0, hits=0, misses=0)
    reference, options = Reference(family_model(family)), {"length_buckets": BUCKETS}
    blends = [cb.BlendConfig(ratio, num_stages=1) for ratio in (1.0, 0.15)]
    with (
        cb.ChunkStore(directory, host_bytes=HOST_BYTES, disk_bytes=8 * HOST_BYTES) as store,
        cb.Engine(family_model(family), store, **options) as engine,
        cb.Engine(family_model(family), **options) as serial,
        ThreadPoolExecutor(num_threads) as pool,
    ):

        def ask(prompt: cb.Prompt, mode: str, blend: cb.BlendConfig, whole: np.ndarray) -> cb.PrefillResult:
            out = engine.prefill(prompt, mode, blend=blend)
            if mode != "blend" or blend is blends[0]:
                error = relative_error(out.logits, whole)
            else:
                error = error_of(out, prompt, reference)
            require(error < TOLERANCE, f"{mode}, {blend}: relative error {error:.2g}")
            return out

        for _ in rounds:
            prompts = [draw_prompt(rng) for _ in range(3)]
            asked = [
                pool.submit(ask, prompt, *rng.choice([("full", blends[0]), ("prefix", blends[0]), *modes]), whole)
                for prompt, whole in [(prompt, serial.prefill(prompt, "full").logits) for prompt in prompts]
                for modes in [[("blend", blend) for blend in blends]] * num_threads
            ]
            for future in asked:
                stats = future.result().stats
                counts.update(prefills=1, hits=stats.hits, misses=stats.misses)
    return dict(counts)


def draw_prompt(rng: random.Random) -> cb.Prompt:
    """Returns a prompt of few enough tokens for `BUCKETS`; its chunks are of few kinds, so that later ones hit."""

    def ids(number: int, size: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, SHAPE["vocab_size"], size).astype(np.int32)

    kinds = [rng.randrange(12) for _ in range(rng.randint(0, 4))]
    chunks = [ids(kind, (1, 5, 13, 20, 25)[kind % 5]) for kind in kinds]
    return cb.Prompt(ids(100, rng.choice([0, 2, 9])), chunks, ids(rng.randrange(200, 2**30), rng.randint(1, 12)))


def error_of(out: cb.PrefillResult, prompt: cb.Prompt, reference: Reference) -> float:
    """Returns the largest relative error of a prefill's logits, keys and values."""
    wanted = reference.prefill(prompt, out.recomputed)
    return max(map(relative_error, (out.logits, out.cache.k, out.cache.v), wanted))


class _Engines:
    """Engines over one store, made when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self._store = cb.ChunkStore(directory, host_bytes=HOST_BYTES)
        self._engines: dict[tuple, cb.Engine] = {}
        self._references: dict[str, Reference] = {}

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()
        self._store.close()

    def get(self, family: str, ratio: float, selector: str, executor: str) -> cb.Engine:
        key = family, ratio, selector, executor
        if key not in self._engines:
            blend = cb.BlendConfig(ratio, selector=selector, num_stages=2)
            options = {"executor": executor, "length_buckets": BUCKETS}
            self._engines[key] = cb.Engine(family_model(family), self._store, blend, **options)
        return self._engines[key]

    def reference(self, family: str) -> Reference:
        return self._references.setdefault(family, Reference(family_model(family)))
