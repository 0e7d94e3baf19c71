"""The decoding loop: after a prefill, one token at a time over a cache that grows in place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.model.decode import Sampling, decode_step, sample
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.runtime.programs import Program

_draw = jax.jit(sample)


def decode(
    model: Model, buckets: Buckets, out: PrefillResult, room: int, sampling: Sampling
) -> Iterator[tuple[int, float]]:
    """Yields up to `room` token ids and the seconds that each one's decoding step took; the first needs none."""
    config = model.config
    length = out.token_ids.size
    key = jax.random.key(sampling.seed)

    def choose(logits: jax.Array, likeliest: jax.Array | int, step: int) -> int:
        if sampling.temperature == 0:
            return int(likeliest)
        step_key = jax.random.fold_in(key, step)
        return int(_draw(logits, step_key, sampling.temperature, sampling.top_k, sampling.top_p))

    token = choose(jnp.asarray(out.logits), out.next_token, 0)
    yield token, 0.0
    if room == 1:
        return
    size = buckets.length(length + room - 1)
    k, v = (_resized(x, size) for x in (out.padded_cache.k, out.padded_cache.v))
    cos, sin = jax.device_put(rope_tables(config, size), model.placement)

    program = decoding_program(model, size, k.sharding)
    for step in range(1, room):
        began = time.perf_counter()
        place = np.int32(length + step - 1)
        logits, likeliest, k, v = program.run(model.params, k, v, np.int32(token), place, cos, sin)
        token = choose(logits, likeliest, step)
        yield token, time.perf_counter() - began


def decoding_program(model: Model, size: int, sharding: jax.sharding.Sharding) -> Program:
    """Returns the program that decodes one token over a cache of `size` tokens, laid out as a prefill left it."""
    config = model.config

    def arguments() -> tuple[Any, ...]:
        shape = (config.num_layers, size, config.num_kv_heads, config.head_dim)
        cache = jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=sharding)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        table = jax.ShapeDtypeStruct((size, config.head_dim // 2), jnp.float32, sharding=model.placement)
        return model.params, cache, cache, scalar, scalar, table, table

    return model.programs.get(decode_step, arguments, donate=(1, 2), config=config, keys=size, sharding=sharding)


def _resized(x: jax.Array, size: int) -> jax.Array:
    """A copy of the cache with room for `size` tokens: decoding donates it, the prefill's result keeps its own."""
    length = min(x.shape[1], size)
    return jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype).at[:, :length].set(x[:, :length])
