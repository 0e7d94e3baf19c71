"""Which keys a query sees, from its chunk's start and its sliding window: one rule for every backend."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def first_visible(
    q_positions: Int[Array, " queries"], q_starts: Int[Array, " queries"] | None, window: int | None
) -> Int[Array, " queries"] | None:
    """Returns each query's first visible key; `None` where that is key 0 for all."""
    if window is None:
        return q_starts
    first_in_window = jnp.maximum(q_positions - (window - 1), 0)
    return first_in_window if q_starts is None else jnp.maximum(q_starts, first_in_window)
