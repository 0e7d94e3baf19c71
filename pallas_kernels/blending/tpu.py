"""KV blending for TPUs, in place: keys stream through VMEM, and only the values that change are moved.

While one block of keys is rotated, the fresh rows of the next one are fetched. Fresh rows ascend, so those of a block
are a range, whose ends are prefetched scalars.
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

from pallas_kernels.blending.traffic import cost, distances_of_rows
from pallas_kernels.tuning import BlendBlocks

MOST_ROWS = 2**16  # fresh rows, whose indices lie in scalar memory
MOST_BYTES = 2**13  # of one key, so that a dozen blocks of 128 keys fit in VMEM at a time
LANES = 128


def unsupported_reason(k_cached: jax.Array, k_fresh: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if k_cached.dtype == jnp.float16 and not interpret:
        return "computes in bfloat16 or float32, not float16"
    if k_cached.shape[2] % 16 or k_cached.shape[2] > 256:
        return f"needs a head_dim of at most 256 that is a multiple of 16, got {k_cached.shape[2]}"
    if k_fresh.shape[0] > MOST_ROWS:
        return f"needs at most {MOST_ROWS} fresh rows, got {k_fresh.shape[0]}"
    if _padded_bytes(k_cached) > MOST_BYTES:
        return f"needs keys of at most {MOST_BYTES} bytes in memory, got {_padded_bytes(k_cached)}"
    return None


def blend_tpu(
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
    size = _block_keys(k_cached, blocks)
    num_blocks = pl.cdiv(num_keys, size)
    borders = jnp.minimum(jnp.arange(num_blocks + 1, dtype=jnp.int32) * size, num_keys)
    ends = (indices[None, :] < borders[:, None]).sum(axis=1, dtype=jnp.int32)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    of_block = pl.BlockSpec((size, num_kv_heads, head_dim), lambda block, *_: (block, 0, 0))
    angles = pl.BlockSpec((size, head_dim // 2), lambda block, *_: (block, 0))
    distances = pl.BlockSpec((2, size), lambda block, *_: (0, block))
    rows = pltpu.VMEM((2, size, num_kv_heads, head_dim), k_cached.dtype)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cached, v_cached)]
    k, v, *deviation = pl.pallas_call(
        _kernel(size, num_blocks, with_deviation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_blocks,),
            in_specs=[of_block, angles, angles, in_memory, in_memory, in_memory],
            out_specs=[of_block, in_memory, *([distances] if with_deviation else [])],
            scratch_shapes=[
                rows,
                *([rows, rows, pltpu.VMEM(rows.shape[1:], jnp.float32)] if with_deviation else []),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            *out_shape,
            *([jax.ShapeDtypeStruct((2, num_keys), jnp.float32)] if with_deviation else []),
        ],
        # XLA first copies what the caller still needs. The interpreter can't alias arrays with a partial last block.
        input_output_aliases={7: 1} if interpret else {2: 0, 7: 1},
        # In order, since each step fetches the fresh rows of the next block.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(k_cached, k_fresh, cos, with_deviation),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="blend_kv_tpu",
    )(indices.astype(jnp.int32), ends, k_cached, cos, sin, k_fresh, v_fresh, v_cached)
    return k, v, distances_of_rows(deviation[0], indices) if with_deviation else None


def _block_keys(k_cached: jax.Array, blocks: BlendBlocks) -> int:
    """Returns the keys of a block."""
    return max(min(blocks.keys, blocks.block_bytes // _padded_bytes(k_cached) // LANES * LANES), LANES)


def _padded_bytes(k_cached: jax.Array) -> int:
    """Returns the bytes of one key in VMEM, where heads are padded to sublanes and head_dim to lanes."""
    _, num_kv_heads, head_dim = k_cached.shape
    return -(-num_kv_heads // 8) * 8 * -(-head_dim // LANES) * LANES * k_cached.dtype.itemsize


def _kernel(size: int, num_blocks: int, with_deviation: bool) -> Callable[..., None]:
    def kernel(indices, ends, k_cached, cos, sin, k_fresh, v_fresh, v_cached, k, v, *rest):
        k_rows, *to_compare, arrived, written = rest[with_deviation:]
        block = pl.program_id(0)

        def each_row(of_block: jax.Array, act: Callable[[jax.Array], None]) -> None:
            lax.fori_loop(ends[of_block], ends[of_block + 1], lambda row, _: act(row), None)

        def copies_in(row: jax.Array, of_block: jax.Array) -> list[Any]:
            slot = of_block % 2
            pairs = [(k_fresh.at[row], k_rows)]
            if with_deviation:
                pairs += zip((v_fresh.at[row], v_cached.at[indices[row]]), to_compare, strict=False)
            return [
                pltpu.make_async_copy(source, target.at[slot, row - ends[of_block]], arrived.at[slot])
                for source, target in pairs
            ]

        def start(of_block: jax.Array) -> None:
            def start_row(row: jax.Array) -> None:
                for copy in copies_in(row, of_block):
                    copy.start()

            each_row(of_block, start_row)

        def wait_for(row: jax.Array) -> None:
            for copy in copies_in(row, block):
                copy.wait()

        def copy_out(row: jax.Array) -> Any:
            return pltpu.make_async_copy(v_fresh.at[row], v.at[indices[row]], written)

        pl.when(block == 0)(lambda: start(block))
        pl.when(block + 1 < num_blocks)(lambda: start(block + 1))
        k[...] = k_cached[...]
        if with_deviation:
            v_difference = to_compare[2]
            v_difference[...] = jnp.zeros_like(v_difference)

        def replace(row: jax.Array) -> None:
            copy_out(row).start()
            at, place = (block % 2, row - ends[block]), indices[row] - block * size
            k[place] = k_rows[at]
            if with_deviation:
                new, old = (x[at].astype(jnp.float32) for x in to_compare[:2])
                v_difference[place] = new - old

        each_row(block, wait_for)  # for all before the first is used: a semaphore counts bytes, not which row came
        each_row(block, replace)
        if with_deviation:
            distances = rest[0]
            distances[0:1] = _squared_norms(k[...].astype(jnp.float32) - k_cached[...].astype(jnp.float32))
            distances[1:2] = _squared_norms(v_difference[...])
        k[...] = _rotate(k[...].astype(jnp.float32), cos[...], sin[...]).astype(k.dtype)
        each_row(block, lambda row: copy_out(row).wait())

    return kernel


def _rotate(
    x: Float[Array, "keys kv_heads head_dim"], cos: Float[Array, "keys half"], sin: Float[Array, "keys half"]
) -> Float[Array, "keys kv_heads head_dim"]:
    half = cos.shape[1]
    cos = jnp.concatenate([cos, cos], axis=1)[:, None, :]
    sin = jnp.concatenate([-sin, sin], axis=1)[:, None, :]
    swapped = jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return x * cos + swapped * sin


def _squared_norms(x: Float[Array, "keys kv_heads head_dim"]) -> Float[Array, "1 keys"]:
    """Returns each key's squared norm, one lane per key: the sum over a head's lanes is a matrix product."""
    squares = jnp.square(x).sum(axis=1)
    ones = jnp.ones((8, squares.shape[1]), jnp.float32)
    sums = lax.dot_general(
        ones, squares, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST
    )
    return sums[0:1]
