"""KV blending in plain XLA: one pass over the keys, and a scatter of the few fresh rows; runs everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.rotary import apply_rope


def blend_xla(
    k_cached: Float[Array, "layers keys kv_heads head_dim"],
    v_cached: Float[Array, "layers keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "layers keys kv_heads head_dim"], Float[Array, "layers keys kv_heads head_dim"]]:
    """Returns stacks of k and v with one layer blended, for validated arguments."""
    # Few rows are fresh: one pass over the keys and a scatter are faster than gathering a row for every key.
    num_keys = k_cached.shape[1]
    if num_keys == 0:
        return k_cached, v_cached
    at = jnp.minimum(indices, num_keys - 1)
    places = jnp.where(indices < num_keys, indices, num_keys + jnp.arange(indices.shape[0], dtype=indices.dtype))

    def replace_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[places].set(rows, mode="drop", indices_are_sorted=True, unique_indices=True)

    k, v = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k_cached, v_cached))
    k = replace_rows(apply_rope(k, cos, sin), apply_rope(k_fresh, cos[at], sin[at]))
    v = replace_rows(v, v_fresh)
    return (
        lax.dynamic_update_index_in_dim(k_cached, k, layer, 0),
        lax.dynamic_update_index_in_dim(v_cached, v, layer, 0),
    )
