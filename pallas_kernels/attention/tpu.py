"""Selective attention for TPUs: block bounds are prefetched scalars, so that unneeded keys are never fetched.

Everything is transposed, scores `[keys, rows]` and output `[head_dim, rows]`: the softmax then reduces over sublanes,
its state is one lane per row, and positions and log-sum-exp are plain vectors of lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.tiles import KeyBlocks, cost, make_tiles, unpack_rows
from pallas_kernels.indexing import entry_of
from pallas_kernels.soft_cap import soft_capped
from pallas_kernels.tuning import AttentionBlocks

MASKED = -1e30  # finite, so that a row that sees nothing of a block stays free of NaN
LANES = 128


def unsupported_reason(q: jax.Array, k: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if q.dtype == jnp.float16 and not interpret:
        return "computes in bfloat16 or float32, not float16"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"needs a head_dim of at most 256 that is a multiple of 8, got {q.shape[2]}"
    return None


def attend_tpu(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "layers keys kv_heads head_dim"],
    v: Float[Array, "layers keys kv_heads head_dim"],
    layer: Int[Array, ""],
    q_positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    *,
    scale: float,
    soft_cap: float | None,
    blocks: AttentionBlocks,
    interpret: bool,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Returns output and log-sum-exp for validated arguments; `starts` already takes the window into account."""
    num_queries, num_heads, head_dim = q.shape
    # Whatever is read of a stack, a copy in another order is made of it.
    k, v = (entry_of(x, layer) for x in (k, v))
    num_keys, num_kv_heads, _ = k.shape
    tile_rows = min(blocks.rows, _round_up(num_queries * num_heads // num_kv_heads, LANES))
    block_keys = min(blocks.keys, _round_up(num_keys, LANES))
    tiles = make_tiles(
        q, q_positions, starts, kv_length, num_kv_heads=num_kv_heads, tile_rows=tile_rows, block_keys=block_keys
    )
    # The tiling of memory asks for copies in head-major order; padding them costs nothing more.
    padding = ((0, _round_up(num_keys, block_keys) - num_keys), (0, 0), (0, 0))
    keys, values = jnp.pad(k, padding).transpose(1, 0, 2), jnp.pad(v, padding).transpose(1, 2, 0)
    num_rows, num_blocks = tiles.rows.shape[1], keys.shape[1] // block_keys

    def key_block(tile: jax.Array, step: jax.Array, begin: Any, end: Any) -> jax.Array:
        # Steps past the last block name it again: then nothing is fetched.
        return jnp.minimum(begin[tile] + step, jnp.maximum(end[tile] - 1, 0))

    def of_tile(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, tile_rows), lambda head, tile, *_: (head, 0, tile))

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(KeyBlocks._fields),
        grid=(num_kv_heads, num_rows // tile_rows, num_blocks),
        in_specs=[
            pl.BlockSpec((2, tile_rows), lambda head, tile, *_: (0, tile)),
            pl.BlockSpec((None, tile_rows, head_dim), lambda head, tile, *_: (head, tile, 0)),
            pl.BlockSpec(
                (None, block_keys, head_dim),
                lambda head, tile, step, begin, _0, _1, end, _2: (head, key_block(tile, step, begin, end), 0),
            ),
            pl.BlockSpec(
                (None, head_dim, block_keys),
                lambda head, tile, step, begin, _0, _1, end, _2: (head, 0, key_block(tile, step, begin, end)),
            ),
        ],
        out_specs=[of_tile(head_dim), of_tile(1)],
        scratch_shapes=[pltpu.VMEM((rows, tile_rows), jnp.float32) for rows in (1, 1, head_dim)],
    )
    visible = jnp.stack([tiles.first_visible, tiles.last_visible])
    out, lse = pl.pallas_call(
        _kernel(scale, soft_cap, block_keys, num_blocks),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, head_dim, num_rows), q.dtype),
            jax.ShapeDtypeStruct((num_kv_heads, 1, num_rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(q, k, tile_rows=tile_rows, block_keys=block_keys),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="selective_attention_tpu",
    )(*tiles.blocks, visible, tiles.rows, keys, values)
    return unpack_rows(out.transpose(0, 2, 1), num_queries, num_heads), unpack_rows(lse[:, 0], num_queries, num_heads)


def _kernel(scale: float, soft_cap: float | None, block_keys: int, num_blocks: int) -> Callable[..., None]:
    def kernel(begin, inner_begin, inner_end, end, last, visible, q, k, v, out, lse, maximum, total, weighted):
        tile, step = pl.program_id(1), pl.program_id(2)
        block = begin[tile] + step
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

        @pl.when(step == 0)
        def _():
            maximum[...] = jnp.full_like(maximum, MASKED)
            total[...] = jnp.zeros_like(total)
            weighted[...] = jnp.zeros_like(weighted)

        def attend(masked: bool) -> None:
            scores = lax.dot_general(
                k[...], q[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
            )
            scores = soft_capped(scores * scale, soft_cap)
            value_block = v[...]
            if masked:
                key = block * block_keys + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                scores = jnp.where((key >= visible[0:1]) & (key <= visible[1:2]), scores, MASKED)
                # Keys that no query sees may be NaN, and zero times NaN is NaN.
                key = block * block_keys + lax.broadcasted_iota(jnp.int32, value_block.shape, 1)
                value_block = jnp.where(key < last[tile], value_block, jnp.zeros_like(value_block))
            new_maximum = jnp.maximum(maximum[...], scores.max(axis=0, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            rescale = jnp.exp(maximum[...] - new_maximum)
            gathered = lax.dot_general(
                value_block,
                weights.astype(value_block.dtype),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=precision,
            )
            maximum[...] = new_maximum
            total[...] = total[...] * rescale + weights.sum(axis=0, keepdims=True)
            weighted[...] = weighted[...] * rescale + gathered

        inner = (block >= inner_begin[tile]) & (block < inner_end[tile])
        pl.when(inner)(lambda: attend(masked=False))
        pl.when((block < end[tile]) & jnp.logical_not(inner))(lambda: attend(masked=True))

        @pl.when(step == num_blocks - 1)
        def _():
            sees_any = visible[1:2] >= 0
            sums = jnp.where(sees_any, total[...], 1.0)
            out[...] = jnp.where(sees_any, weighted[...] / sums, 0.0).astype(out.dtype)
            lse[...] = jnp.where(sees_any, maximum[...] + jnp.log(sums), -jnp.inf)

    return kernel


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
