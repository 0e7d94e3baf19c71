"""The memory traffic that the Pallas backends of `blend_kv` declare to XLA."""

from __future__ import annotations

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.blending.quantised import QuantisedKV


def cost(
    k_cached: Float[Array, "layers keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    cos: Float[Array, "keys half"],
    stored: QuantisedKV | None = None,
) -> pl.CostEstimate:
    """Returns what a blend in place costs: a layer's keys pass once, and of the values only the fresh rows move."""
    num_layers = k_cached.shape[0]
    layer, row = k_cached.nbytes // num_layers, k_fresh.nbytes // k_fresh.shape[0]
    num_fresh, angles = k_fresh.shape[0], 2 * cos.nbytes
    read = layer + angles + 4 * num_fresh + 2 * num_fresh * row
    written = layer + num_fresh * row
    if stored is not None:  # the values pass, too
        read += sum(x.nbytes for x in stored) - layer
        written = 2 * layer
    flops = 3 * k_cached.size // num_layers
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=read + written)
