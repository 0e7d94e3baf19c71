"""Selective attention for NVIDIA Hopper by Pallas' Mosaic GPU: wgmma, TMA, one loading and two computing warpgroups.

Each block of the grid computes one tile of query rows for one KV head. The loading warpgroup keeps key and value
blocks in flight. The two computing warpgroups have half of the tile's rows each and take turns at the tensor cores, so
that the softmax of one runs beside the products of the other.

Arguments named after what they hold are references to arrays in GPU or shared memory; Pallas has no public type for
them, so they are `Any`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.mosaic_gpu_memory import Exponents, Shape, Shared, scratch
from pallas_kernels.attention.tiles import Grid, KeyBlocks, cost, make_grid, make_tiles, merge_splits
from pallas_kernels.indexing import entry_of
from pallas_kernels.tuning import AttentionBlocks

COMPUTING = 2  # computing warpgroups, at most
CONCURRENT = 132  # blocks of the grid: shared memory holds one on each multiprocessor of an H100 or H200
GROUP = 8  # keys that the tensor memory accelerator reads at a time
NVCC = "nvidia-cuda-nvcc-cu12"  # the wheel whose `ptxas` compiles the kernel for CUDA 12
LOG2_E = math.log2(math.e)


def unsupported_reason(q: jax.Array, k: jax.Array, *, interpret: bool) -> str | None:
    """Returns why the kernel can't serve arrays of these shapes and dtypes; `None` where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16 (wgmma would round {q.dtype} to TF32)"
    if q.shape[2] % 16 or not 32 <= q.shape[2] <= 256:
        return f"needs a head_dim of 32 to 256 that is a multiple of 16, got {q.shape[2]}"
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return "has an interpreter from jax 0.11 on (Python 3.12 or later)"
    if not interpret and (version := _miscompiling_compiler()):
        return f"needs {NVCC} before 12.8 or from 12.9.86 on: {version} miscompiles masks"
    return None


def _miscompiling_compiler() -> str | None:
    """Returns the version of the installed wheel with `ptxas` where it is of CUDA 12.8.0 to 12.9.0.

    Those miscompile masks: Pallas' own attention for Hopper refuses them. The `ptxas` of a local toolkit is not seen.
    """
    try:
        version = metadata.version(NVCC)
    except metadata.PackageNotFoundError:
        return None
    return version if (12, 8) <= tuple(map(int, version.split("."))) < (12, 9, 86) else None


def attend_mosaic_gpu(
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
    rows = blocks.rows // COMPUTING
    # Where one warpgroup holds all rows, as of a single query, another would compute padding.
    computing = 1 if num_queries * num_heads // num_kv_heads <= rows else COMPUTING
    tile_rows = computing * rows
    q, exponents = _with_exponents(q, scale, soft_cap)
    tiles = make_tiles(
        q,
        q_positions,
        starts,
        kv_length,
        num_kv_heads=num_kv_heads,
        tile_rows=tile_rows,
        block_keys=blocks.keys,
    )
    shape = Shape(
        computing=computing,
        rows=rows,
        keys=blocks.keys,
        stages=blocks.stages,
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype),
        exponents=exponents,
        has_starts=starts is not None,
        interpret=interpret,
    )
    num_rows = tiles.rows.shape[1]
    grid = make_grid(num_rows // tile_rows, num_kv_heads, num_keys, concurrent=CONCURRENT)
    tail = kv_length // blocks.keys
    of_layer = jax.ShapeDtypeStruct(k.shape[1:], k.dtype)
    # The tensor memory accelerator reads keys in groups; the last ones come from the tail block anyway.
    if missing := -num_keys % GROUP:
        padding = ((0, 0), (0, missing), (0, 0), (0, 0))
        k, v = (jnp.pad(entry_of(x, layer)[None], padding) for x in (k, v))
        layer = jnp.zeros_like(layer)
    first_key, first_group = layer * k.shape[1], layer * (k.shape[1] // GROUP)
    k, v = (x.reshape(-1, num_kv_heads, head_dim) for x in (k, v))  # all layers' keys in a row
    tails = [_tail_block(x, first_key, tail, kv_length, blocks.keys).swapaxes(0, 1) for x in (k, v)]
    rows_and_tails = jnp.concatenate([tiles.rows, *tails], axis=1)  # one array: XLA makes it by one kernel
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = vars(plgpu)["InterpretGPUParams"](detect_races=True)
    if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:  # from jax 0.11 on
        options["cost_estimate"] = cost(q, of_layer, tile_rows=tile_rows, block_keys=blocks.keys)
    out, lse = plgpu.kernel(
        _kernel(shape, grid, num_rows),
        out_type=[
            jax.ShapeDtypeStruct((grid.num_splits, num_kv_heads, num_rows, head_dim), q.dtype),
            jax.ShapeDtypeStruct((grid.num_splits, num_kv_heads, num_rows), jnp.float32),
        ],
        scratch_types=scratch(shape),
        grid=(grid.size,),
        grid_names=("block",),
        num_threads=computing + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="selective_attention_mosaic_gpu",
        **options,
    )(
        jnp.stack([*tiles.blocks[:4], jnp.full_like(tiles.blocks.begin, tail)]),  # one array: by one kernel
        first_group.reshape(1),  # by itself: a constant, where the layer is one
        *tiles.row_bounds(has_starts=shape.has_starts),
        rows_and_tails,
        k,
        v,
    )
    return merge_splits(out, lse, num_queries, num_heads)


def _with_exponents(
    q: Float[Array, "queries heads head_dim"], scale: float, soft_cap: float | None
) -> tuple[Float[Array, "queries heads head_dim"], Exponents]:
    """Returns queries, and what makes exponents of their products with keys: the highest product counts most."""
    exponent_scale = abs(scale) * LOG2_E
    if exponent_scale < float(jnp.finfo(jnp.float32).tiny):
        return q * 0, Exponents(1.0)
    q = q if scale > 0 else -q
    if soft_cap is None:
        return q, Exponents(exponent_scale)
    return q, Exponents(soft_cap * LOG2_E, abs(scale) / soft_cap)


def _tail_block(
    x: Float[Array, "keys kv_heads head_dim"],
    first_key: Int[Array, ""],
    tail: Int[Array, ""],
    kv_length: Int[Array, ""],
    size: int,
) -> Float[Array, "size kv_heads head_dim"]:
    """Returns the block that holds the last valid key, with zeros after it: zero times NaN is NaN."""
    at = first_key + tail * size + jnp.arange(size, dtype=jnp.int32)
    return jnp.where((at < first_key + kv_length)[:, None, None], x[jnp.minimum(at, x.shape[0] - 1)], 0)


def _kernel(shape: Shape, grid: Grid, num_rows: int) -> Callable[..., None]:
    def kernel(bounds, first_group, first_visible, last_visible, packed, *rest):
        k, v, out, lse, *scratch = rest
        shared = Shared(*scratch)
        tile, split, kv_head = grid.place(lax.axis_index("block"))
        warpgroup = lax.axis_index("warpgroup")
        # Here `last` names the block that comes from the tail arrays, whose padding is zero: no mask needs it.
        blocks = KeyBlocks(*(bounds[bound, tile] for bound in range(5)))
        blocks = blocks.part(split, grid.num_splits)

        @pl.when(warpgroup < shape.computing)
        def _():
            if shape.computing == COMPUTING:
                plgpu.set_max_registers(232, action="increase")
            rows = pl.ds((tile * shape.computing + warpgroup) * shape.rows, shape.rows)
            plgpu.copy_gmem_to_smem(packed.at[kv_head, rows], shared.q.at[warpgroup], shared.q_loaded.at[warpgroup])
            row_first, row_last = (_load_rows(x, rows) for x in (first_visible, last_visible))
            plgpu.barrier_wait(shared.q_loaded.at[warpgroup])
            _compute(shape, shared, blocks, warpgroup, row_first, row_last)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.q.at[warpgroup], out.at[split, kv_head, rows])
            plgpu.copy_smem_to_gmem(shared.lse.at[warpgroup], lse.at[split, kv_head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == shape.computing)
        def _():
            if shape.computing == COMPUTING:
                plgpu.set_max_registers(40, action="decrease")
            tails = [packed.at[kv_head, pl.ds(num_rows + part * shape.keys, shape.keys)] for part in range(2)]
            _load(shape, shared, blocks, kv_head, first_group[0], (k, v), tails)

    return kernel


def _add_product(
    accumulator: Float[Array, "rows head_dim"], a: Float[Array, "rows keys"], b: Any, in_memory: Any
) -> Float[Array, "rows head_dim"]:
    """Returns `accumulator + a @ b` once it is complete; `a` is in registers, `b` in shared memory.

    In the interpreter `in_memory` is the shared memory that `a` is copied to; else it is `None`.
    """
    if in_memory is None:
        return pl.run_state(lambda product: plgpu.wgmma(product, a, b))(plgpu.ACC.init(accumulator))
    # The interpreter supports neither an accumulator with initial values nor operands in registers.
    in_memory[...] = a

    def multiply(product: Any) -> jax.Array:
        plgpu.wgmma(product, in_memory, b)
        return product[...]

    rows, columns = accumulator.shape
    return accumulator + pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))


def _tanh(products: Float[Array, "rows keys"], scale: float) -> Float[Array, "rows keys"]:
    """Returns `tanh(scale * products)`.

    The hardware's own has a relative error of 2^-11, which a cap of 50 makes hundredths of a score. This is exact to
    float32's last digits, by the operations that the hardware is fast at.
    """
    root = lax.rsqrt(1 + jnp.exp2(products * (2 * LOG2_E * scale)))
    return 1 - 2 * (root * root)


def _load_rows(source: Any, rows: Any) -> Int[Array, " rows"]:
    options: dict[str, Any] = {"layout": plgpu.Layout.WGMMA.reduce(1), "optimized": False}
    if "idx" in inspect.signature(plgpu.load).parameters:  # before jax 0.11
        return plgpu.load(source, (rows,), **options)
    return plgpu.load(source.at[rows], **options)


def _load(
    shape: Shape,
    shared: Shared,
    blocks: KeyBlocks,
    kv_head: Any,
    first_group: Any,
    stored: Sequence[Any],
    tails: Any,
) -> None:
    """Keeps `stages` blocks in flight, from the first needed one to the last."""
    count = blocks.end - blocks.begin
    streams = (
        (stored[0], tails[0], shared.k, shared.k_loaded, shared.k_read),
        (stored[1], tails[1], shared.v, shared.v_loaded, shared.v_read),
    )

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(shape.stages))

    def fetch(step: jax.Array, carry: None) -> None:
        slot, block = slot_of(step), blocks.begin + step
        # Keys are read half a step before the values of the same block: their slot need not wait for those.
        for source, tail, target, loaded, read in streams:

            @pl.when(step >= shape.stages)
            def _wait_until_read(read=read):
                plgpu.barrier_wait(read.at[slot])

            destination = target.at[slot], loaded.at[slot]

            @pl.when(block == blocks.last)
            def _from_tail(tail=tail, destination=destination):
                plgpu.copy_gmem_to_smem(tail, *destination)

            @pl.when(block != blocks.last)
            def _from_stored(source=source, destination=destination):
                keys = pl.ds((first_group + block * (shape.keys // GROUP)) * GROUP, shape.keys)
                plgpu.copy_gmem_to_smem(source.at[keys, kv_head], *destination)

        return carry

    def wait_until_read(step: jax.Array, carry: None) -> None:
        for *_, read in streams:
            plgpu.barrier_wait(read.at[slot_of(step)])
        return carry

    lax.fori_loop(0, count, fetch, None)
    # A barrier must not end in a phase that nobody waited for.
    lax.fori_loop(jnp.maximum(count - shape.stages, 0), count, wait_until_read, None)


def _compute(
    shape: Shape,
    shared: Shared,
    blocks: KeyBlocks,
    warpgroup: Any,
    row_first: Int[Array, " rows"],
    row_last: Int[Array, " rows"],
) -> None:
    """Runs one warpgroup's rows over all the tile's blocks; leaves output and log-sum-exp in shared memory."""
    rows, head_dim, exponents = shape.rows, shape.head_dim, shape.exponents

    def end_turn() -> None:
        if shape.computing > 1:
            plgpu.barrier_arrive(shared.turn)

    def wait_for_turn() -> None:
        if shape.computing > 1:
            plgpu.barrier_wait(shared.turn)

    def take_turns() -> None:
        end_turn()
        wait_for_turn()

    def step(masked: bool, block: jax.Array, carry: Any) -> Any:
        weighted, maximum, total = carry
        slot = lax.rem(block - blocks.begin, jnp.int32(shape.stages))
        plgpu.barrier_wait(shared.k_loaded.at[slot])

        def product(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, shared.q.at[warpgroup], plgpu.transpose_ref(shared.k.at[slot], (1, 0)))
            take_turns()
            return scores[...]

        scores = pl.run_scoped(product, plgpu.ACC((rows, shape.keys), jnp.float32))
        plgpu.barrier_arrive(shared.k_read.at[slot])
        if exponents.inner_scale is not None:
            scores = _tanh(scores, exponents.inner_scale)
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + block * shape.keys
            visible = key <= lax.broadcast_in_dim(row_last, scores.shape, [0])
            if shape.has_starts:
                visible &= key >= lax.broadcast_in_dim(row_first, scores.shape, [0])
            scores = jnp.where(visible, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        rescale = jnp.exp2((maximum - new_maximum) * exponents.scale)
        # Softmax in powers of two, which the hardware computes; scaling and subtraction are one instruction.
        subtracted = lax.broadcast_in_dim(new_maximum * exponents.scale, scores.shape, [0])
        weights = jnp.exp2(scores * exponents.scale - subtracted)
        total = total * rescale + weights.sum(axis=1)
        weighted = weighted * lax.broadcast_in_dim(rescale, weighted.shape, [0])
        weights = weights.astype(shape.dtype)
        end_turn()
        plgpu.barrier_wait(shared.v_loaded.at[slot])
        wait_for_turn()

        weighted = _add_product(
            weighted, weights, shared.v.at[slot], shared.weights.at[warpgroup] if shape.interpret else None
        )
        plgpu.barrier_arrive(shared.v_read.at[slot])
        return weighted, new_maximum, total

    def filled(size: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(size, value, jnp.float32), layout)

    carry = (
        filled((rows, head_dim), 0.0, plgpu.Layout.WGMMA),
        # Finite, also when scaled: a row that sees nothing of its first block has weights of 0 there, not NaN.
        filled((rows,), -1e30 / max(exponents.scale, 1.0), plgpu.Layout.WGMMA.reduce(1)),
        filled((rows,), 0.0, plgpu.Layout.WGMMA.reduce(1)),
    )
    # One warpgroup is half a step behind the other: while one multiplies, the other does its softmax.
    pl.when(warpgroup == 1)(take_turns)
    if shape.has_starts:
        carry = lax.fori_loop(blocks.begin, blocks.inner_begin, lambda i, c: step(True, i, c), carry)
    carry = lax.fori_loop(blocks.inner_begin, blocks.inner_end, lambda i, c: step(False, i, c), carry)
    weighted, maximum, total = lax.fori_loop(blocks.inner_end, blocks.end, lambda i, c: step(True, i, c), carry)
    pl.when(warpgroup == 0)(take_turns)

    sees_any = (row_last >= 0) & (total != 0)  # a NaN is passed on
    total = jnp.where(sees_any, total, 1.0)
    out = weighted * lax.broadcast_in_dim(1.0 / total, weighted.shape, [0])
    out = jnp.where(lax.broadcast_in_dim(sees_any, out.shape, [0]), out, 0.0)
    shared.q.at[warpgroup][...] = out.astype(shape.dtype)
    lse = (maximum * exponents.scale + jnp.log2(total)) / LOG2_E
    shared.lse.at[warpgroup][...] = jnp.where(sees_any, lse, -jnp.inf)
