"""The norm of every family: RMSNorm whose weight may be stored less an offset."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from cacheblend_jax.model.config import ModelConfig


class RMSNorm(nnx.Module):
    """Divides by the root mean square and multiplies by `offset + scale`, in float32; rounds once.

    `nnx.RMSNorm` has no offset. It cannot be added to the stored scale: in bfloat16, 1 + scale would lose digits.
    """

    def __init__(self, config: ModelConfig, size: int):
        self.dtype, self.epsilon, self.offset = jnp.dtype(config.dtype), config.rms_norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, self.dtype))

    def __call__(self, x: Float[Array, "*axes size"]) -> Float[Array, "*axes size"]:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        scale = jnp.expand_dims(self.offset + self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        factor = lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        # In this order: XLA for GPUs then normalises rows in one kernel, with `factor * scale` first in three.
        return (x * factor * scale).astype(self.dtype)


def normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    """Returns what the norm makes of `x`; where there is none, `x` itself."""
    return x if norm is None else norm(x)
