"""Goes on from what was said: prefills more tokens over a context's KV, and nothing of it a second time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.blend.schedule import Plan, Stage
from cacheblend_jax.engine.generation import angles_of
from cacheblend_jax.engine.prompt import TextOrIds, check_length, ids_of
from cacheblend_jax.engine.results import Context, PrefillResult, PrefillStats
from cacheblend_jax.errors import PromptError
from cacheblend_jax.model.decode import extend_prompt
from cacheblend_jax.model.kv_cache import with_room
from cacheblend_jax.model.model import Model
from cacheblend_jax.runtime.programs import shapes_of


def extend_context(model: Model, buckets: Buckets, context: Context, more: TextOrIds) -> PrefillResult:
    """Prefills text or tokens after a context, which is not changed; see `Engine.extend`."""
    config, begin = model.config, context.num_cached
    token_ids = ids_of(more, "what follows", model.tokenizer, config.vocab_size)
    if token_ids.size == 0:
        raise PromptError("what follows has no tokens")
    all_ids = np.concatenate([context.token_ids, token_ids])
    length = all_ids.size
    check_length(length, config.max_positions, "the conversation")
    rows = buckets.active(length - begin)
    size = buckets.length(begin + rows)
    padded = np.zeros(rows, np.int32)
    padded[: length - begin] = all_ids[begin:]

    def run(runner: Callable[..., Any], cache: Any) -> Any:
        arrays = padded, np.int32(begin), np.int32(length - begin), angles_of(model, size)
        room = runner(with_room, cache, num_keys=size)
        return runner(extend_prompt, model.params, room, *arrays, donate=("cache",), config=config)

    abstract = shapes_of(context.cache)
    name = ("extend", type(context.cache), context.cache.k.shape, size, rows)
    prepared = model.runner.prepare(name, lambda runner: run(runner, abstract))
    began = time.perf_counter()
    out = run(model.runner, context.cache)
    next_token = int(out.next_token)
    ttft_s = time.perf_counter() - began
    computed = [np.arange(begin, length)] * config.num_layers
    stats = PrefillStats(
        mode="extend",
        tokens=length,
        ttft_s=ttft_s,
        host_s=0.0,
        load_s=0.0,
        compile_s=prepared.compile_s,
        hits=0,
        misses=0,
        exact=begin,
        candidates=0,
        forced=length - begin,
        recompute_ratio=0.0,
        flops=prefill_flops(config, computed),
        peak_memory_bytes=prepared.peak_memory_bytes,
    )
    plan = Plan(size, rows, (Stage(0, config.num_layers - 1, rows),))
    return PrefillResult(np.asarray(out.logits), all_ids, next_token, stats, out.cache, computed, plan)
