"""KV deviation: how far a token's fresh keys and values are from its cached ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.rope import Angles
from pallas_kernels import apply_rope


def kv_deviation(
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    k_cached: Float[Array, "tokens kv_heads head_dim"],
    v_cached: Float[Array, "tokens kv_heads head_dim"],
    valid: Bool[Array, " tokens"],
    part: str = "kv",
) -> Float[Array, " tokens"]:
    """Returns each token's squared L2 distance in float32, K (before RoPE) plus V.

    Each is divided by its layer's mean squared norm, taken over the fresh rows of the `valid` tokens, so that neither
    dominates. `part` `"k"` or `"v"` measures one alone.

    Source: CacheBlend (arXiv 2405.16444) §4.2, definition 1; before RoPE the distance does not depend on the position.
    """
    deviation = jnp.zeros(k_fresh.shape[0], jnp.float32)
    for name, fresh, cached in (("k", k_fresh, k_cached), ("v", v_fresh, v_cached)):
        if name in part:
            deviation += relative_squared_distance(fresh, cached, valid)
    return deviation


def relative_squared_distance(
    fresh: Float[Array, "tokens kv_heads head_dim"],
    cached: Float[Array, "tokens kv_heads head_dim"],
    valid: Bool[Array, " tokens"],
) -> Float[Array, " tokens"]:
    """Returns each token's squared L2 distance over the mean squared norm of the `valid` fresh rows, in float32."""
    fresh, cached = fresh.astype(jnp.float32), cached.astype(jnp.float32)
    norms = jnp.where(valid, jnp.square(fresh).sum(axis=(1, 2)), 0.0)
    mean_norm = norms.sum() / jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    distance = jnp.square(fresh - cached).sum(axis=(1, 2))
    return distance / jnp.maximum(mean_norm, jnp.finfo(jnp.float32).tiny)


def total_deviation(
    full: KVCache,
    cached: KVCache,
    angles: Angles,
    length: Int[Array, ""] | int,
    *,
    config: ModelConfig,
) -> Float[Array, " keys"]:
    """Returns each token's KV deviation summed over all layers, from the cache of a full prefill (keys rotated).

    The keys of `cached` are before RoPE. Rotation preserves distances except for YaRN's attention factor, which
    both sides have.
    """
    valid = jnp.arange(full.k.shape[1], dtype=jnp.int32) < length

    def add_layer(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        true, stored = full.layer(index), cached.layer(index)
        total += relative_squared_distance(true.k, apply_rope(stored.k, *angles.of_layer(config, index)), valid)
        total += relative_squared_distance(true.v, stored.v, valid)
        return total, None

    layers = jnp.arange(full.k.shape[0], dtype=jnp.int32)
    return lax.scan(add_layer, jnp.zeros(full.k.shape[1], jnp.float32), layers)[0]
