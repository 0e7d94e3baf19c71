"""The rotation of RoPE, written once for queries, fresh keys and cached keys, so that all of them agree to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(
    x: Float[Array, "tokens heads head_dim"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
) -> Float[Array, "tokens heads head_dim"]:
    """Rotates each head's pairs `(x[i], x[i + head_dim/2])` by the angle of the token's position.

    Computed in float32 and rounded once to the dtype of `x`. `cos` and `sin` (float32) are the tables' rows of the
    tokens; RoPE scaling and attention factors are already in them.

    Source: Su et al., RoFormer (arXiv 2104.09864), in the half-split layout of Hugging Face Llama.
    """
    with jax.named_scope("rope"):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
