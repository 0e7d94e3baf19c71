"""Selective attention for NVIDIA GPUs, on Hopper the second choice, by Pallas' Triton backend while JAX keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.tiles import Grid, KeyBlocks, cost, make_grid, make_tiles, merge_splits
from pallas_kernels.indexing import entry_of
from pallas_kernels.soft_cap import soft_capped
from pallas_kernels.tuning import AttentionBlocks

CONCURRENT = 256  # programs: about two on each multiprocessor of a large GPU
MASKED = -1e30  # finite, so that a row that sees nothing of a block stays free of NaN


def unsupported_reason(q: jax.Array, k: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if q.shape[2] > 256:
        return f"needs a head_dim of at most 256, got {q.shape[2]}"
    return None


def attend_triton(
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
    _, num_keys, num_kv_heads, _ = k.shape
    # The sizes of Triton's arrays are powers of two: other head_dims, and a last block of keys, are padded.
    width = max(pl.next_power_of_2(head_dim), 16)
    padding = ((0, -num_keys % blocks.keys), (0, 0), (0, width - head_dim))
    if (num_keys, head_dim) != (num_keys + padding[0][1], width):
        q = jnp.pad(q, ((0, 0), (0, 0), (0, width - head_dim)))
        k, v = (jnp.pad(entry_of(x, layer), padding)[None] for x in (k, v))
        layer = jnp.zeros_like(layer)
    first_key = (layer * k.shape[1]).reshape(1)
    k, v = (x.reshape(-1, num_kv_heads, width) for x in (k, v))  # all layers' keys in a row
    tiles = make_tiles(
        q,
        q_positions,
        starts,
        kv_length,
        num_kv_heads=num_kv_heads,
        tile_rows=blocks.rows,
        block_keys=blocks.keys,
    )
    num_rows = tiles.rows.shape[1]
    grid = make_grid(num_rows // blocks.rows, num_kv_heads, num_keys, concurrent=CONCURRENT)
    out_dtype = q.dtype if grid.num_splits == 1 else jnp.float32  # rounded once, after the merge

    of_layer = jax.ShapeDtypeStruct((num_keys, num_kv_heads, width), k.dtype)

    def specified(sizes: tuple[int | None, ...], at: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(sizes, lambda block: at(*grid.place(block)))

    whole = specified((k.shape[0], None, width), lambda tile, split, head: (0, head, 0))
    row = specified((blocks.rows,), lambda tile, split, head: (tile,))
    bound = specified((1,), lambda tile, split, head: (tile,))
    rows = specified((None, blocks.rows, width), lambda tile, split, head: (head, tile, 0))
    out_rows = specified((None, None, blocks.rows, width), lambda tile, split, head: (split, head, tile, 0))
    out_lse = specified((None, None, blocks.rows), lambda tile, split, head: (split, head, tile))
    out, lse = pl.pallas_call(
        _kernel(grid, scale, soft_cap, blocks.keys, has_starts=starts is not None),
        grid=(grid.size,),
        in_specs=[specified((1,), lambda *_: (0,)), *[bound] * len(tiles.blocks), row, row, rows, whole, whole],
        out_specs=[out_rows, out_lse],
        out_shape=[
            jax.ShapeDtypeStruct((grid.num_splits, num_kv_heads, num_rows, width), out_dtype),
            jax.ShapeDtypeStruct((grid.num_splits, num_kv_heads, num_rows), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=cost(q, of_layer, tile_rows=blocks.rows, block_keys=blocks.keys),
        interpret=interpret,
        name="selective_attention_triton",
    )(first_key, *tiles.blocks, *tiles.row_bounds(has_starts=starts is not None), tiles.rows, k, v)
    out, lse = merge_splits(out, lse, num_queries, num_heads)
    return out[..., :head_dim].astype(q.dtype), lse


def _kernel(
    grid: Grid, scale: float, soft_cap: float | None, block_keys: int, *, has_starts: bool
) -> Callable[..., None]:
    def kernel(first_key, begin, inner_begin, inner_end, end, last, first_visible, last_visible, q, k, v, out, lse):
        num_rows, width = q.shape
        queries, row_first, row_last = q[...], first_visible[...], last_visible[...]
        blocks = KeyBlocks(begin[0], inner_begin[0], inner_end[0], end[0], last[0])
        blocks = blocks.part(grid.place(pl.program_id(0))[1], grid.num_splits)
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

        def step(masked: bool, block: jax.Array, carry: Any) -> Any:
            weighted, maximum, total = carry
            keys = pl.ds(first_key[0] + block * block_keys, block_keys)
            scores = plt.dot(queries, k[keys, :], trans_b=True, precision=precision).astype(jnp.float32) * scale
            scores = soft_capped(scores, soft_cap)
            value_block = v[keys, :]
            if masked:
                key = block * block_keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                visible = key <= row_last[:, None]
                if has_starts:
                    visible &= key >= row_first[:, None]
                scores = jnp.where(visible, scores, MASKED)
                # Keys that no query sees may be NaN, and zero times NaN is NaN.
                key = block * block_keys + lax.broadcasted_iota(jnp.int32, value_block.shape, 0)
                value_block = jnp.where(key < blocks.last, value_block, jnp.zeros_like(value_block))
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            weights = jnp.exp(scores - new_maximum[:, None])
            rescale = jnp.exp(maximum - new_maximum)
            gathered = plt.dot(weights.astype(value_block.dtype), value_block, precision=precision)
            weighted = weighted * rescale[:, None] + gathered.astype(jnp.float32)
            return weighted, new_maximum, total * rescale + weights.sum(axis=1)

        carry = (
            jnp.zeros((num_rows, width), jnp.float32),
            jnp.full((num_rows,), MASKED, jnp.float32),
            jnp.zeros((num_rows,), jnp.float32),
        )
        if has_starts:
            carry = lax.fori_loop(blocks.begin, blocks.inner_begin, lambda i, c: step(True, i, c), carry)
        carry = lax.fori_loop(blocks.inner_begin, blocks.inner_end, lambda i, c: step(False, i, c), carry)
        weighted, maximum, total = lax.fori_loop(blocks.inner_end, blocks.end, lambda i, c: step(True, i, c), carry)
        sees_any = (row_last >= 0) & (total != 0)  # a NaN is passed on
        total = jnp.where(sees_any, total, 1.0)
        out[...] = jnp.where(sees_any[:, None], weighted / total[:, None], 0.0).astype(out.dtype)
        lse[...] = jnp.where(sees_any, maximum + jnp.log(total), -jnp.inf)

    return kernel
