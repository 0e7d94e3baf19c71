"""KV blending in plain XLA: one pass over the keys, and a scatter of the few fresh rows; runs everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rotary import apply_rope


def blend_xla(
    k_cached: jax.Array,
    v_cached: jax.Array,
    k_fresh: jax.Array,
    v_fresh: jax.Array,
    indices: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    with_deviation: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns `(k rotated, v, deviation)` of validated arguments."""
    # Few rows are fresh: one pass over the keys and a scatter beat a gather of a row for every key.
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


def _squared_distance(fresh: jax.Array, cached: jax.Array) -> jax.Array:
    return jnp.square(fresh.astype(jnp.float32) - cached.astype(jnp.float32)).sum(axis=(1, 2))
