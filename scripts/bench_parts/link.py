"""Stored KV on its way to the device: a blend from host memory beside its two bounds, loading and recomputing."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.evaluation.whole_prefills import CHUNK, RATIO, SUFFIX, config_of
from pallas_kernels.dispatch import current_target
from scripts.bench_parts.predictions import OF_LINK, seconds_for_flops, seconds_for_link
from scripts.bench_parts.timing import Row, row


def link(options: argparse.Namespace) -> Iterator[Row]:
    """TTFT from host memory, with all KV kept on the device, and of full recompute; and loading alone.

    `staged`: with layers put together in host memory first, as where entries cannot be page-locked. `query`: with that
    selector, whose pass of the question all layers are loaded for before the blend begins.

    The stored KV is random: what it takes does not depend on it. A device that keeps all layers has nothing to load, so
    that its TTFT is the recomputing. `of_bound`: of the longer of the two.
    """
    # Images for GPUs lack what these import; the other parts run without.
    import cacheblend_jax as cb
    from cacheblend_jax.evaluation.prompts import random_prompt
    from scripts.bench_parts.weights import random_weights

    shape, length, kernel, chip = options.shapes[0], options.lengths[0], options.kernels[0], current_target().chip
    model = random_weights(config_of(shape, options.dtype))
    chunks = max((length - SUFFIX) // CHUNK, 1)
    prompt = random_prompt(model.config.vocab_size, length - SUFFIX, chunks=chunks, question_tokens=SUFFIX)
    store = cb.ChunkStore(host_bytes=2**40, kv_dtype=options.kv_dtype)
    blend = cb.BlendConfig(RATIO, "hkvd")
    how: dict[str, Any] = {"context": "", "kernels": kernel}
    host = cb.Engine(model, store, blend, kept_bytes=0, **how)
    device = cb.Engine(model, store, blend, kept_bytes=2**40, **how)
    staged = cb.Engine(model, store, blend, kept_bytes=0, **how)
    asked = cb.BlendConfig(RATIO, "query")
    asking, asking_staged = (cb.Engine(model, store, asked, kept_bytes=0, **how) for _ in range(2))
    for engine in (staged, asking_staged):
        engine._groups.first.delivery.locks_entries = False
    stored = fill(host, prompt)
    flops = host.prefill(prompt).stats.flops
    recompute_s, load_s = seconds_for_flops(flops, chip, "prefill blend"), seconds_for_link(stored, chip)
    runs: dict[str, Callable[[], float]] = {
        "device": lambda: device.prefill(prompt).stats.ttft_s,
        "load": lambda: load_seconds(host, prompt),
        "host": lambda: host.prefill(prompt).stats.ttft_s,
        "staged load": lambda: load_seconds(staged, prompt),
        "staged": lambda: staged.prefill(prompt).stats.ttft_s,
        "query": lambda: asking.prefill(prompt).stats.ttft_s,
        "query staged": lambda: asking_staged.prefill(prompt).stats.ttft_s,
    }
    predicted = dict.fromkeys(runs) | {"device": recompute_s, "load": load_s}
    if recompute_s is not None and load_s is not None:
        predicted["host"] = OF_LINK["first layer"] * load_s + max(recompute_s, load_s)
    found = in_turn(runs, options.repeats)
    bound = max(found["load"]["ms"], found["device"]["ms"])
    case = {"case": f"{shape} {length}"}
    for name, times in found.items():
        rates = {"gb_s": stored / 1e6} if name.endswith("load") else {}
        yield case | row(name, times, predicted[name], **rates) | {"of_bound": times["ms"] / bound}
    engines = {"host": host, "device": device}
    executors = {f"{name} executor": engine.prefill(prompt).stats.executor for name, engine in engines.items()}
    yield case | {"name": "how", "page_locked": host._groups.first.delivery.locks_pages} | executors
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
        for name, engine in engines.items():
            trace = cb.Trace()
            engine.prefill(prompt, trace=trace)
            trace.save(options.profile / f"{shape}-{length}-{kernel}-link-{name}.json")
    full = in_turn({"full": lambda: host.prefill(prompt, "full").stats.ttft_s}, options.repeats)["full"]
    yield case | row("full", full, None) | {"of_bound": full["ms"] / bound}


def fill(engine: Any, prompt: Any) -> int:
    """Stores random KV for a prompt's chunks; returns its bytes as they are stored."""
    from cacheblend_jax.store import ChunkEntry

    config, rng = engine.model.config, np.random.default_rng(0)
    tokens = max(len(ids) for ids in prompt.chunks)
    shape = (config.num_layers, tokens, config.num_kv_heads, config.head_dim)
    drawn = (0.1 * rng.standard_normal(shape, np.float32)).astype(config.dtype)
    for ids, found in zip(prompt.chunks, engine.look_up(prompt), strict=True):
        entry = ChunkEntry(*(drawn[:, : len(ids)].copy() for _ in "kv")).hand_over()
        engine.store.put(found.key, entry)
    return engine.store.stats.host.bytes


def load_seconds(engine: Any, prompt: Any) -> float:
    """Seconds until all layers of a prompt's stored KV have come to the device, layer by layer, with nothing to do."""
    from cacheblend_jax.engine.layout import look_up
    from cacheblend_jax.model.kv_cache import KVCache

    out = engine.prefill(prompt)
    plan, blended = out.plan, KVCache(*map(jnp.copy, (out.cache.k, out.cache.v)))
    jax.block_until_ready(blended)
    delivery, placed = engine._groups.first.delivery, engine._place(prompt, "")
    with ExitStack() as handles:
        chunks, _ = look_up(placed, engine.store, handles, engine.model.config)
        chunks = [chunk for chunk in chunks if chunk.stored is not None]
        began = time.perf_counter()
        with delivery.stream(plan, chunks, 0, None, first=0, layers=engine._groups.first._layer_indices) as stream:
            for _ in range(engine.model.config.num_layers):
                if (layer := stream.next()) is None:
                    blended = stream.placed(blended)
                    stream.used_until(first_value(blended))
                else:
                    stream.used_until(layer.v)
            jax.block_until_ready(blended)
        return time.perf_counter() - began  # closing the stream waits for the last layer


@jax.jit
def first_value(cache: Any) -> jax.Array:
    """A value that is there once the cache is: nobody overwrites it as he may the cache."""
    return cache.k[0, 0, 0, 0]


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, Row]:
    """Median, fastest and slowest of the seconds that each run returns, in milliseconds; the first ones warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            if turn:
                seconds[name].append(1e3 * took)
    return {
        name: {"ms": statistics.median(of), "ms_fastest": min(of), "ms_slowest": max(of)}
        for name, of in seconds.items()
    }
