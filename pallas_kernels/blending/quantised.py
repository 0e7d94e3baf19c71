"""Quantised KV as `blend_kv` takes it: codes of one byte, and a scale per token and KV head."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


class QuantisedKV(NamedTuple):
    """K before RoPE and V as codes (int8 or float8_e4m3fn), each the value divided by its token's and head's scale."""

    k: Shaped[Array, "*layers keys kv_heads head_dim"]
    v: Shaped[Array, "*layers keys kv_heads head_dim"]
    k_scales: Float[Array, "*layers keys kv_heads"]
    v_scales: Float[Array, "*layers keys kv_heads"]


def dequantised(
    codes: Shaped[Array, "*keys kv_heads head_dim"],
    scales: Float[Array, "*keys kv_heads"],
    offset: Float[Array, "kv_heads head_dim"] | None = None,
) -> Float[Array, "*keys kv_heads head_dim"]:
    """Returns `codes * scales + offset` in float32: the product is exact there, so that all backends agree to the bit.

    Args:
        offset: what was subtracted from every token's values before they were quantised.
    """
    with jax.named_scope("dequantise"):
        values = codes.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
        return values if offset is None else values + offset.astype(jnp.float32)[None]
