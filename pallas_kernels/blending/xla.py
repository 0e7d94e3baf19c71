"""KV blending in plain XLA: one pass over the keys, and a scatter of the few fresh rows; runs everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rotary import apply_rope


def blend_xla(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    *,
    with_deviation: bool,
) -> tuple[
    Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"], Float[Array, "tokens 2"] | None
]:
    """Returns `(k rotated, v, deviation)` for validated arguments."""
    # Few rows are fresh: one pass over the keys and a scatter are faster than gathering a row for every key.
    num_keys = k_cached.shape[0]
    if num_keys == 0:
        return k_cached, v_cached, jnp.zeros((indices.shape[0], 2), jnp.float32) if with_deviation else None
    at = jnp.minimum(indices, num_keys - 1)
    places = jnp.where(indices < num_keys, indices, num_keys + jnp.arange(indices.shape[0], dtype=indices.dtype))

    def replace_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[places].set(rows, mode="drop", indices_are_sorted=True, unique_indices=True)

    k = replace_rows(apply_rope(k_cached, cos, sin), apply_rope(k_fresh, cos[at], sin[at]))
    v = replace_rows(v_cached, v_fresh)
    if not with_deviation:
        return k, v, None
    parts = [_squared_distance(k_fresh, k_cached[at]), _squared_distance(v_fresh, v_cached[at])]
    return k, v, jnp.where((indices < num_keys)[:, None], jnp.stack(parts, axis=1), 0.0)


def _squared_distance(
    fresh: Float[Array, "tokens kv_heads head_dim"], cached: Float[Array, "tokens kv_heads head_dim"]
) -> Float[Array, " tokens"]:
    return jnp.square(fresh.astype(jnp.float32) - cached.astype(jnp.float32)).sum(axis=(1, 2))
