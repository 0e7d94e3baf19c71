"""KV deviation: how far a token's fresh keys and values are from its cached ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
    drowns the other. `part` `"k"` or `"v"` measures one alone.

    Source: CacheBlend (arXiv 2405.16444) §4.2, definition 1; before RoPE the distance does not depend on the place.
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
    """Squared L2 distance of each token's rows over the mean squared norm of the `valid` fresh ones, in float32."""
    fresh, cached = fresh.astype(jnp.float32), cached.astype(jnp.float32)
    norms = jnp.where(valid, jnp.square(fresh).sum(axis=(1, 2)), 0.0)
    mean_norm = norms.sum() / jnp.maximum(valid.sum(), 1)
    distance = jnp.square(fresh - cached).sum(axis=(1, 2))
    return distance / jnp.maximum(mean_norm, jnp.finfo(jnp.float32).tiny)


def total_deviation(
    k_full: Float[Array, "layers keys kv_heads head_dim"],
    v_full: Float[Array, "layers keys kv_heads head_dim"],
    k_cached: Float[Array, "layers keys kv_heads head_dim"],
    v_cached: Float[Array, "layers keys kv_heads head_dim"],
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    length: Int[Array, ""] | int,
) -> Float[Array, " keys"]:
    """Returns each token's KV deviation summed over all layers, from the cache of a full prefill (`k_full` rotated).

    `k_cached` is before RoPE. Rotation keeps distances but for YaRN's attention factor, which both sides carry.
    """
    valid = jnp.arange(k_full.shape[1]) < length

    def add_layer(total: jax.Array, layer: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        k, v, k_stored, v_stored = layer
        k_stored = apply_rope(k_stored, cos, sin)
        total += relative_squared_distance(k, k_stored, valid) + relative_squared_distance(v, v_stored, valid)
        return total, None

    return lax.scan(add_layer, jnp.zeros(k_full.shape[1], jnp.float32), (k_full, v_full, k_cached, v_cached))[0]
