"""What the Pallas backends of `blend_kv` share: the memory traffic that they declare, and distances per row."""

from __future__ import annotations

from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int


def cost(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    cos: Float[Array, "keys half"],
    with_deviation: bool,
) -> pl.CostEstimate:
    """Returns what a blend in place costs: keys pass once, and of the values only the fresh rows move."""
    num_keys, row = k_cached.shape[0], k_cached.nbytes // k_cached.shape[0]
    num_fresh, angles = k_fresh.shape[0], 2 * cos.nbytes
    read = num_keys * row + angles + 4 * num_fresh + 2 * num_fresh * row
    written = num_keys * row + num_fresh * row
    if with_deviation:  # the replaced values are read too
        read, written = read + num_fresh * row, written + 8 * num_keys
    return pl.CostEstimate(
        flops=3 * k_cached.size + 6 * k_fresh.size * with_deviation, transcendentals=0, bytes_accessed=read + written
    )


def distances_of_rows(by_key: Float[Array, "2 keys"], indices: Int[Array, " tokens"]) -> Float[Array, "tokens 2"]:
    """Picks the fresh rows' distances out of every key's; zeros for padding rows."""
    return by_key.at[:, indices].get(mode="fill", fill_value=0.0).T
