"""What `blend_kv` means, in plain `jnp` over a dense match of keys and rows: every backend is tested against it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def blend_kv_reference(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    *,
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
) -> tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"]]:
    """Returns what `blend_kv` must, computed in the dtype of its arguments."""
    is_place = indices[None, :] == jnp.arange(k_cached.shape[0])[:, None]  # [keys, tokens]
    replaced, row = is_place.any(axis=1)[:, None, None], is_place.argmax(axis=1)
    k = jnp.where(replaced, k_fresh[row], k_cached)
    v = jnp.where(replaced, v_fresh[row], v_cached)
    first, second = jnp.split(k, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), v
