"""The soft cap of scores and logits, as Gemma 2 has it: near zero they stay as they are, and none exceeds the cap."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_capped(scores: Float[Array, "*shape"], soft_cap: float | None) -> Float[Array, "*shape"]:
    """Returns `soft_cap * tanh(scores / soft_cap)`, or the scores as they are where there is no cap.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
