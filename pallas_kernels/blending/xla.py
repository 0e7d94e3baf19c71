"""KV blending in plain XLA: one pass over the keys, and a scatter of the few fresh rows; runs everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blending.quantised import QuantisedKV, dequantised
from pallas_kernels.indexing import at_each, entry_of, with_entry
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
    stored: QuantisedKV | None = None,
    k_offset: Float[Array, "kv_heads head_dim"] | None = None,
) -> tuple[Float[Array, "layers keys kv_heads head_dim"], Float[Array, "layers keys kv_heads head_dim"]]:
    """Returns stacks of k and v with one layer blended, for validated arguments."""
    # Few rows are fresh: one pass over the keys and a scatter are faster than gathering a row for every key.
    num_keys = k_cached.shape[1]
    if num_keys == 0:
        return k_cached, v_cached
    at = jnp.minimum(indices, num_keys - 1)
    places = jnp.where(indices < num_keys, indices, num_keys + jnp.arange(indices.shape[0], dtype=indices.dtype))

    def replace_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[places].set(
            rows, mode="drop", indices_are_sorted=True, unique_indices=True, wrap_negative_indices=False
        )

    if stored is None:
        k, v = (entry_of(x, layer) for x in (k_cached, v_cached))
    else:
        k, v = dequantised(stored.k, stored.k_scales, k_offset), dequantised(stored.v, stored.v_scales)
    turned = apply_rope(k, cos, sin).astype(k_fresh.dtype)
    k, v = replace_rows(turned, apply_rope(k_fresh, at_each(cos, at), at_each(sin, at))), v.astype(v_fresh.dtype)
    v = replace_rows(v, v_fresh)
    return (
        with_entry(k_cached, k, layer),
        with_entry(v_cached, v, layer),
    )
