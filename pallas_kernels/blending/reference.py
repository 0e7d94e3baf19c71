"""What `blend_kv` means, in plain `jnp` over a dense match of keys and rows: every backend is tested against it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blending.quantised import QuantisedKV, dequantised


def blend_kv_reference(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    *,
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    stored: QuantisedKV | None = None,
    k_offset: Float[Array, "kv_heads head_dim"] | None = None,
) -> tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"]]:
    """Returns what `blend_kv` must, computed in the dtype of its arguments."""
    if stored is not None:
        k_cached = dequantised(stored.k, stored.k_scales, k_offset).astype(k_cached.dtype)
        v_cached = dequantised(stored.v, stored.v_scales).astype(v_cached.dtype)
    is_place = indices[None, :] == jnp.arange(k_cached.shape[0])[:, None]  # [keys, tokens]
    replaced, row = is_place.any(axis=1)[:, None, None], is_place.argmax(axis=1)
    k = jnp.where(replaced, k_fresh[row], k_cached)
    v = jnp.where(replaced, v_fresh[row], v_cached)
    first, second = jnp.split(k, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), v
