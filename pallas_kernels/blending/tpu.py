"""KV blending for TPUs, in place: keys stream through VMEM, and only the values that change are moved.

While one block of keys is rotated, the fresh rows of the next one are fetched. Fresh rows ascend, so those of a block
are a range, whose ends are prefetched scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blending.quantised import QuantisedKV, dequantised
from pallas_kernels.blending.traffic import cost
from pallas_kernels.tuning import BlendBlocks

MOST_ROWS = 2**16  # fresh rows, whose indices lie in scalar memory
MOST_BYTES = 2**13  # of one key, so that a dozen blocks of 128 keys fit in VMEM at a time
LANES = 128


DEQUANTISES = ("int8",)  # dtypes of codes


def unsupported_reason(k_cached: jax.Array, k_fresh: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if k_cached.dtype == jnp.float16 and not interpret:
        return "computes in bfloat16 or float32, not float16"
    if k_cached.shape[-1] % 16 or k_cached.shape[-1] > 256:
        return f"needs a head_dim of at most 256 that is a multiple of 16, got {k_cached.shape[-1]}"
    if k_fresh.shape[0] > MOST_ROWS:
        return f"needs at most {MOST_ROWS} fresh rows, got {k_fresh.shape[0]}"
    if _padded_bytes(k_cached) > MOST_BYTES:
        return f"needs keys of at most {MOST_BYTES} bytes in memory, got {_padded_bytes(k_cached)}"
    return None


def blend_tpu(
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
    size = _block_keys(k_cached, blocks)
    if interpret and (missing := -num_keys % size):  # the interpreter can't alias arrays with a partial last block
        k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k_cached, v_cached))
        cos, sin = (jnp.pad(x, ((0, missing), (0, 0))) for x in (cos, sin))
        indices = jnp.where(indices < num_keys, indices, num_keys + missing)
        if stored is not None:
            stored = QuantisedKV(*(jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for x in stored))
        more = (stored, k_offset)
        k, v = blend_tpu(k, v, k_fresh, v_fresh, indices, cos, sin, layer, *more, blocks=blocks, interpret=interpret)
        return k[:, :num_keys], v[:, :num_keys]
    num_blocks = pl.cdiv(num_keys, size)
    borders = jnp.minimum(jnp.arange(num_blocks + 1, dtype=jnp.int32) * size, num_keys)
    ends = (indices[None, :] < borders[:, None]).sum(axis=1, dtype=jnp.int32)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    of_block = pl.BlockSpec((None, size, num_kv_heads, head_dim), lambda block, layer, *_: (layer[0], block, 0, 0))
    angles = pl.BlockSpec((size, head_dim // 2), lambda block, *_: (block, 0))
    of_stored: list[Any] = []
    if stored is not None:
        codes = pl.BlockSpec((size, num_kv_heads, head_dim), lambda block, *_: (block, 0, 0))
        scales = pl.BlockSpec((size, num_kv_heads), lambda block, *_: (block, 0))
        of_stored = [codes, codes, scales, scales]
        if k_offset is not None:
            of_stored.append(pl.BlockSpec((num_kv_heads, head_dim), lambda *_: (0, 0)))
    rows = pltpu.VMEM((2, size, num_kv_heads, head_dim), k_cached.dtype)
    k, v = pl.pallas_call(
        _kernel(size, num_blocks, is_quantised=stored is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_blocks,),
            in_specs=[in_memory if of_stored else of_block, angles, angles, *[in_memory] * 3, *of_stored],
            out_specs=[of_block, of_block if of_stored else in_memory],
            scratch_shapes=[
                rows,
                pltpu.SemaphoreType.DMA((2,)),
                *([rows, pltpu.SemaphoreType.DMA((2,))] if of_stored else [pltpu.SemaphoreType.DMA]),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cached, v_cached)],
        input_output_aliases={3: 0, 8: 1},  # XLA first copies what the caller still needs
        # In order, since each step fetches the fresh rows of the next block.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(k_cached, k_fresh, cos, stored),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="blend_kv_tpu",
    )(
        layer.reshape(1),
        indices.astype(jnp.int32),
        ends,
        k_cached,
        cos,
        sin,
        k_fresh,
        v_fresh,
        v_cached,
        *(stored or ()),
        *([] if stored is None or k_offset is None else [k_offset]),
    )
    return k, v


def _block_keys(k_cached: jax.Array, blocks: BlendBlocks) -> int:
    """Returns the keys of a block."""
    return max(min(blocks.keys, blocks.block_bytes // _padded_bytes(k_cached) // LANES * LANES), LANES)


def _padded_bytes(k_cached: jax.Array) -> int:
    """Returns the bytes of one key in VMEM, where heads are padded to sublanes and head_dim to lanes."""
    num_kv_heads, head_dim = k_cached.shape[-2:]
    return -(-num_kv_heads // 8) * 8 * -(-head_dim // LANES) * LANES * k_cached.dtype.itemsize


def _kernel(size: int, num_blocks: int, *, is_quantised: bool) -> Callable[..., None]:
    return _quantised_kernel(size, num_blocks) if is_quantised else _plain_kernel(size, num_blocks)


class _Rows:
    """Fresh rows of K or V on their way to a block of keys, while the block before it is computed."""

    def __init__(self, fresh: Any, indices: Any, ends: Any, buffer: Any, arrived: Any) -> None:
        self._fresh, self._indices, self._ends, self._buffer, self._arrived = fresh, indices, ends, buffer, arrived

    def start(self, block: jax.Array) -> None:
        self._each(block, lambda row: self._copy(row, block).start())

    def place(self, block: jax.Array, into: Any, size: int) -> None:
        """Waits for a block's rows, all before the first is used: a semaphore counts bytes, not which row came."""
        self._each(block, lambda row: self._copy(row, block).wait())

        def replace(row: jax.Array) -> None:
            into[self._indices[row] - block * size] = self._buffer[block % 2, row - self._ends[block]]

        self._each(block, replace)

    def _each(self, block: jax.Array, act: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(self._ends[block], self._ends[block + 1], lambda row, _: act(row), None)

    def _copy(self, row: jax.Array, block: jax.Array) -> Any:
        slot = block % 2
        buffer = self._buffer.at[slot, row - self._ends[block]]
        return pltpu.make_async_copy(self._fresh.at[row], buffer, self._arrived.at[slot])


def _quantised_kernel(size: int, num_blocks: int) -> Callable[..., None]:
    """As `_plain_kernel`, but the values stream, too: all of them are written."""

    def kernel(of_layer, indices, ends, _k, cos, sin, k_fresh, v_fresh, _v, *rest):
        *stored, k, v, k_buffer, k_arrived, v_buffer, v_arrived = rest
        k_codes, v_codes, k_scales, v_scales, *k_offset = stored
        block = pl.program_id(0)
        fresh = (
            _Rows(k_fresh, indices, ends, k_buffer, k_arrived),
            _Rows(v_fresh, indices, ends, v_buffer, v_arrived),
        )
        for rows in fresh:
            pl.when(block == 0)(partial(rows.start, block))
            pl.when(block + 1 < num_blocks)(partial(rows.start, block + 1))
        offset = k_offset[0][...] if k_offset else None
        k[...] = dequantised(k_codes[...], k_scales[...], offset).astype(k.dtype)
        v[...] = dequantised(v_codes[...], v_scales[...]).astype(v.dtype)
        for rows, into in zip(fresh, (k, v), strict=True):
            rows.place(block, into, size)
        k[...] = _rotate(k[...].astype(jnp.float32), cos[...], sin[...]).astype(k.dtype)

    return kernel


def _plain_kernel(size: int, num_blocks: int) -> Callable[..., None]:
    def kernel(of_layer, indices, ends, k_cached, cos, sin, k_fresh, v_fresh, v_cached, k, v, k_rows, arrived, written):
        block, layer = pl.program_id(0), of_layer[0]
        rows = _Rows(k_fresh, indices, ends, k_rows, arrived)

        def each_value(act: Callable[[Any], None]) -> None:
            def copy_out(row: jax.Array) -> Any:
                return pltpu.make_async_copy(v_fresh.at[row], v.at[layer, indices[row]], written)

            lax.fori_loop(ends[block], ends[block + 1], lambda row, _: act(copy_out(row)), None)

        pl.when(block == 0)(lambda: rows.start(block))
        pl.when(block + 1 < num_blocks)(lambda: rows.start(block + 1))
        each_value(lambda copy: copy.start())
        k[...] = k_cached[...]
        rows.place(block, k, size)
        k[...] = _rotate(k[...].astype(jnp.float32), cos[...], sin[...]).astype(k.dtype)
        each_value(lambda copy: copy.wait())

    return kernel


def _rotate(
    x: Float[Array, "keys kv_heads head_dim"], cos: Float[Array, "keys half"], sin: Float[Array, "keys half"]
) -> Float[Array, "keys kv_heads head_dim"]:
    half = cos.shape[1]
    cos = jnp.concatenate([cos, cos], axis=1)[:, None, :]
    sin = jnp.concatenate([-sin, sin], axis=1)[:, None, :]
    swapped = jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return x * cos + swapped * sin
