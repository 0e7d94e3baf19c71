"""KV blending for NVIDIA GPUs by Pallas' Triton backend, in place: keys pass once, and only changed values move.

The kernel is bound by memory. Each program finds the fresh rows of its keys by binary search, so that no table of them
is needed; for each key it loads either the fresh row or the cached one, and of the values only those it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.blending.quantised import QuantisedKV
from pallas_kernels.blending.traffic import cost
from pallas_kernels.tuning import BlendBlocks

DEQUANTISES = ("int8",)  # dtypes of codes


def unsupported_reason(k_cached: jax.Array, k_fresh: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if k_cached.shape[-1] > 256:
        return f"needs a head_dim of at most 256, got {k_cached.shape[-1]}"
    return None


def blend_triton(
    k_cached: Float[Array, "layers keys kv_heads head_dim"],
    v_cached: Float[Array, "layers keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    layer: Int[Array, ""],
    stored: QuantisedKV | None = None,
    k_offset: Float[Array, "kv_heads head_dim"] | None = None,
    *,
    blocks: BlendBlocks,
    interpret: bool,
) -> tuple[Float[Array, "layers keys kv_heads head_dim"], Float[Array, "layers keys kv_heads head_dim"]]:
    """Returns stacks of k and v with one layer blended, for validated arguments."""
    _, num_keys, num_kv_heads, head_dim = k_cached.shape
    # As one array: keys and values that are parts of one product are cut out of it by one kernel then, not two.
    fresh = jnp.stack([k_fresh, v_fresh])
    arguments = layer.reshape(1), k_cached, v_cached, fresh, indices.astype(jnp.int32), cos, sin, *(stored or ())
    if stored is not None and k_offset is not None:
        arguments = *arguments, k_offset
    whole = [pl.BlockSpec(x.shape, _origin(x.ndim)) for x in arguments]
    k, v = pl.pallas_call(
        _kernel(blocks.keys, head_dim // 2),
        grid=(pl.cdiv(num_keys, blocks.keys), num_kv_heads),
        in_specs=whole,
        out_specs=whole[1:3],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cached, v_cached)],
        input_output_aliases={1: 0, 2: 1},  # XLA first copies what the caller still needs
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=1),
        cost_estimate=cost(k_cached, k_fresh, cos, stored),
        interpret=interpret,
        name="blend_kv_triton",
    )(*arguments)
    return k, v


def _origin(ndim: int) -> Callable[..., tuple[int, ...]]:
    return lambda *_: (0,) * ndim


def _kernel(block_keys: int, half: int) -> Callable[..., None]:
    width = pl.next_power_of_2(half)  # the sizes of Triton's arrays are powers of two

    def kernel(of_layer, k_cached, v_cached, fresh, indices, cos, sin, *rest):
        *stored, k, v = rest
        num_keys, num_rows = k_cached.shape[1], fresh.shape[1]
        layer, head = of_layer[0], pl.program_id(1)
        keys = pl.program_id(0) * block_keys + jnp.arange(block_keys, dtype=jnp.int32)
        rows, replaced = _find(indices, keys, num_rows)
        column = jnp.arange(width, dtype=jnp.int32)
        # Masked lanes have places of their own, since the interpreter writes back there what it read.
        key, row, first, second = keys[:, None], rows[:, None], column[None, :], half + column[None, :]
        is_value = (keys < num_keys)[:, None] & (column < half)[None, :]
        is_fresh = is_value & replaced[:, None]

        def load(source: Any, mask: jax.Array, *at: Any) -> jax.Array:
            return plt.load(source.at[at], mask=mask, other=0)

        is_old = is_value & ~replaced[:, None]
        masks = (keys < num_keys) & ~replaced, (column < half)[None, :], is_old
        k_old, v_old = _dequantising(stored, load, keys, head, masks) if stored else (None, None)
        halves = []
        for columns in (first, second):
            k_new, v_new = (load(fresh, is_fresh, part, row, head, columns) for part in range(2))
            old = load(k_cached, is_old, layer, key, head, columns) if k_old is None else k_old(columns)
            halves.append(jnp.where(is_fresh, k_new.astype(jnp.float32), old.astype(jnp.float32)))
            if v_old is None:
                plt.store(v.at[layer, key, head, columns], v_new, mask=is_fresh)
            else:
                values = jnp.where(is_fresh, v_new, v_old(columns).astype(v.dtype))
                plt.store(v.at[layer, key, head, columns], values, mask=is_value)
        cosine, sine = load(cos, is_value, key, first), load(sin, is_value, key, first)
        turned = (halves[0] * cosine - halves[1] * sine, halves[1] * cosine + halves[0] * sine)
        for columns, x in zip((first, second), turned, strict=True):
            plt.store(k.at[layer, key, head, columns], x.astype(k.dtype), mask=is_value)

    return kernel


def _dequantising(
    stored: Sequence[Any],
    load: Callable[..., jax.Array],
    keys: Int[Array, " keys"],
    head: Any,
    masks: tuple[Bool[Array, " keys"], Bool[Array, "1 width"], Bool[Array, "keys width"]],
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns what loads some columns of the stored keys, and of the stored values, as float32.

    Args:
        masks: of keys, of columns, and of both.
    """
    k_codes, v_codes, k_scales, v_scales, *k_offset = stored
    is_old, is_column, is_value = masks

    def loader(codes: Any, scales: Any, offset: Sequence[Any] = ()) -> Callable[[jax.Array], jax.Array]:
        def loaded(columns: jax.Array) -> jax.Array:
            scale = load(scales, is_old, keys, head).astype(jnp.float32)[:, None]
            values = load(codes, is_value, keys[:, None], head, columns).astype(jnp.float32) * scale
            return values + load(offset[0], is_column, head, columns).astype(jnp.float32) if offset else values

        return loaded

    return loader(k_codes, k_scales, k_offset), loader(v_codes, v_scales)


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
