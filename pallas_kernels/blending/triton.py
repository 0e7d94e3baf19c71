"""KV blending for NVIDIA GPUs by Pallas' Triton backend, in place: keys pass once, and only changed values move.

The kernel is bound by memory. Each program finds the fresh rows of its keys by binary search, so that no table of them
is needed; for each key it loads either the fresh row or the cached one, and of the values only those it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.blending.traffic import cost, distances_of_rows
from pallas_kernels.tuning import BlendBlocks


def unsupported_reason(k_cached: jax.Array, k_fresh: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if k_cached.shape[2] > 256:
        return f"needs a head_dim of at most 256, got {k_cached.shape[2]}"
    return None


def blend_triton(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    *,
    with_deviation: bool,
    blocks: BlendBlocks,
    interpret: bool,
) -> tuple[
    Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"], Float[Array, "tokens 2"] | None
]:
    """Returns `(k rotated, v, deviation)` for validated arguments."""
    num_keys, num_kv_heads, head_dim = k_cached.shape
    whole = [pl.BlockSpec(x.shape, _origin(x.ndim)) for x in (k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin)]
    by_key = jax.ShapeDtypeStruct((2, num_kv_heads, num_keys), jnp.float32)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cached, v_cached)]
    k, v, *deviation = pl.pallas_call(
        _kernel(blocks.keys, head_dim // 2),
        grid=(pl.cdiv(num_keys, blocks.keys), num_kv_heads),
        in_specs=whole,
        out_specs=[*whole[:2], *([pl.BlockSpec(by_key.shape, _origin(3))] if with_deviation else [])],
        out_shape=[*out_shape, *([by_key] if with_deviation else [])],
        input_output_aliases={0: 0, 1: 1},  # XLA first copies what the caller still needs
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        cost_estimate=cost(k_cached, k_fresh, cos, with_deviation),
        interpret=interpret,
        name="blend_kv_triton",
    )(k_cached, v_cached, k_fresh, v_fresh, indices.astype(jnp.int32), cos, sin)
    return k, v, distances_of_rows(deviation[0].sum(axis=1), indices) if with_deviation else None


def _origin(ndim: int) -> Callable[..., tuple[int, ...]]:
    return lambda *_: (0,) * ndim


def _kernel(block_keys: int, half: int) -> Callable[..., None]:
    width = pl.next_power_of_2(half)  # the sizes of Triton's arrays are powers of two

    def kernel(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin, k, v, *deviation):
        num_keys, num_rows = k_cached.shape[0], k_fresh.shape[0]
        head = pl.program_id(1)
        keys = pl.program_id(0) * block_keys + jnp.arange(block_keys, dtype=jnp.int32)
        is_key = keys < num_keys
        rows, replaced = _find(indices, keys, num_rows)
        column = jnp.arange(width, dtype=jnp.int32)
        # Masked lanes have places of their own, since the interpreter writes back there what it read.
        key, row, first, second = keys[:, None], rows[:, None], column[None, :], half + column[None, :]
        is_value = is_key[:, None] & (column < half)[None, :]
        is_fresh = is_value & replaced[:, None]
        is_read = is_value if deviation else is_value & ~replaced[:, None]

        def load(source: Any, mask: jax.Array, *at: Any) -> jax.Array:
            return plt.load(source.at[at], mask=mask, other=0)

        def squared_distance(fresh: jax.Array, cached: jax.Array) -> jax.Array:
            difference = jnp.where(is_fresh, fresh.astype(jnp.float32) - cached.astype(jnp.float32), 0.0)
            return jnp.square(difference).sum(axis=1)

        halves, of_k, of_v = [], jnp.zeros(block_keys, jnp.float32), jnp.zeros(block_keys, jnp.float32)
        for columns in (first, second):
            k_new, v_new = (load(x, is_fresh, row, head, columns) for x in (k_fresh, v_fresh))
            k_old = load(k_cached, is_read, key, head, columns)
            halves.append(jnp.where(is_fresh, k_new, k_old).astype(jnp.float32))
            if deviation:
                of_k += squared_distance(k_new, k_old)
                of_v += squared_distance(v_new, load(v_cached, is_fresh, key, head, columns))
            plt.store(v.at[key, head, columns], v_new, mask=is_fresh)
        cosine, sine = load(cos, is_value, key, first), load(sin, is_value, key, first)
        turned = (halves[0] * cosine - halves[1] * sine, halves[1] * cosine + halves[0] * sine)
        for columns, x in zip((first, second), turned, strict=True):
            plt.store(k.at[key, head, columns], x.astype(k.dtype), mask=is_value)
        if deviation:
            for part, distance in enumerate((of_k, of_v)):
                plt.store(deviation[0].at[part, head, keys], distance, mask=is_key)

    return kernel


def _find(indices: Any, key: Int[Array, " keys"], num_rows: int) -> tuple[Int[Array, " keys"], Bool[Array, " keys"]]:
    """Returns for each key the first row whose index is not below the key, and whether that index is the key."""
    low, high = jnp.zeros_like(key), jnp.full_like(key, num_rows)
    for _ in range(num_rows.bit_length()):
        middle = (low + high) // 2
        below = plt.load(indices.at[jnp.minimum(middle, num_rows - 1)]) < key
        below &= middle < high
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
    at = jnp.minimum(low, num_rows - 1)
    return at, (plt.load(indices.at[at]) == key) & (low < num_rows)
