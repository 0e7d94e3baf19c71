"""KV deviation: how far a token's fresh keys and values are from its cached ones."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.rope import Angles
from pallas_kernels import apply_rope
from pallas_kernels.partition import by_shares, current_partition


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
    pairs = {"k": (k_fresh, k_cached), "v": (v_fresh, v_cached)}
    deviation = jnp.zeros(k_fresh.shape[0], jnp.float32)
    for norms, distance in squared_sums([pair for name, pair in pairs.items() if name in part]):
        deviation += _relative(norms, distance, valid)
    return deviation


def relative_squared_distance(
    fresh: Float[Array, "tokens kv_heads head_dim"],
    cached: Float[Array, "tokens kv_heads head_dim"],
    valid: Bool[Array, " tokens"],
) -> Float[Array, " tokens"]:
    """Returns each token's squared L2 distance over the mean squared norm of the `valid` fresh rows, in float32."""
    ((norms, distance),) = squared_sums([(fresh, cached)])
    return _relative(norms, distance, valid)


def _relative(
    norms: Float[Array, " tokens"], distance: Float[Array, " tokens"], valid: Bool[Array, " tokens"]
) -> Float[Array, " tokens"]:
    norms = jnp.where(valid, norms, 0.0)
    mean_norm = norms.sum() / jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    return distance / jnp.maximum(mean_norm, jnp.finfo(jnp.float32).tiny)


def squared_sums(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns each token's squared norm, and squared distance, of pairs of fresh and cached keys, or values.

    Where KV heads are split over a mesh, one sum over the devices gives all of them, so that each device chooses the
    same tokens.
    """
    partition = current_partition()

    def of_share(*arrays: Float[Array, "tokens kv_heads head_dim"]) -> list[jax.Array] | jax.Array:
        sums = []
        for fresh, cached in zip(arrays[::2], arrays[1::2], strict=True):
            fresh, cached = fresh.astype(jnp.float32), cached.astype(jnp.float32)
            sums += [jnp.square(fresh).sum(axis=(1, 2)), jnp.square(fresh - cached).sum(axis=(1, 2))]
        return sums if partition is None else partition.summed(jnp.stack(sums), "kv_heads")

    arrays = [array for pair in pairs for array in pair]
    sums = list(by_shares(of_share, [(None, "kv_heads")] * len(arrays), ())(*arrays))
    return list(zip(sums[::2], sums[1::2], strict=True))


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
