"""The parts of `gpu_bench.py` that need the kernels alone: are they right, how fast, and the limits of the device."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import blend_kv, selective_attention, tuning
from pallas_kernels.dispatch import current_target, pallas_backends, wrong_platform
from pallas_kernels.proving.attention_cases import ATTENTION
from pallas_kernels.proving.blending_cases import BLENDING
from pallas_kernels.proving.case import Operation, error_share
from pallas_kernels.proving.trial import compiled, first_line, shapes_of
from pallas_kernels.tuning import AttentionBlocks
from scripts.bench_parts.predictions import seconds_for_bytes, seconds_for_flops
from scripts.bench_parts.timing import Row, measured, row

RATIO = 0.15
IN_A_LOOP = 50  # calls of attention so short that launching one from the host takes longer
CANDIDATES = [AttentionBlocks(128, keys, stages) for keys, stages in itertools.product((64, 128), (2, 3, 4))]


def backends(operation: Operation = ATTENTION) -> tuple[str, ...]:
    """The operation's backends that run on this device and need no interpreter, best first; XLA last."""
    target = current_target()
    able = () if target.platform == "cpu" else pallas_backends(target)
    return (*(name for name in able if name in operation.backends and wrong_platform(name, target) is None), "xla")


def check(options: argparse.Namespace) -> Iterator[Row]:
    """The cases by which kernels prove themselves, of one dtype and head_dim, with XLA's products in full precision."""
    for operation in (ATTENTION, BLENDING):
        for name in backends(operation):
            found: Row = {"op": operation.name, "name": name}
            try:
                with jax.default_matmul_precision("highest"):
                    yield found | largest_error(operation, name, options.dtype, options.head_dim)
            except Exception as error:
                yield found | {"error": first_line(error)}


def largest_error(operation: Operation, backend: str, dtype: str, head_dim: int) -> Row:
    """The largest error against float64, as a share of what rounding allows, and the case that has it."""
    reason = None if backend == "xla" else operation.unsupported(dtype, head_dim)[backend]()
    if reason is not None:
        return {"error": reason}
    programs, worst = {}, (-1.0, "")
    for case in operation.cases(dtype, head_dim):
        if case.program not in programs:
            programs[case.program] = compiled(case.call, shapes_of(case), backend)
        got = programs[case.program](*jax.device_put(case.arrays))
        worst = max(worst, (error_share(got, case.wanted()), case.name))
    return {"error_of_allowed": worst[0], "case": worst[1], "right": worst[0] <= 1}


def limits(options: argparse.Namespace) -> Iterator[Row]:
    chip, size, n = current_target().chip, options.copy_mb * 10**6 // 4, options.matmul
    x, a = jnp.ones(size, jnp.float32), jnp.ones((n, n), options.dtype)
    copy = measured({"copy": lambda x: x + 1}, (x,), options.repeats)["copy"]
    yield row("copy", copy, seconds_for_bytes(8 * size, chip, "copy"), gb_s=8 * size / 1e6)
    product = measured({"matmul": lambda a, b: a @ b}, (a, a), options.repeats)["matmul"]
    yield row("matmul", product, seconds_for_flops(2 * n**3, chip, "matmul"), tflops=2 * n**3 / 1e9)


def visible_flops(positions: np.ndarray, heads: int, head_dim: int) -> int:
    """Multiply-adds, counted as two, of the scores that the queries see and of their weighted values."""
    return 4 * heads * head_dim * int((positions.astype(np.int64) + 1).sum())


def attention_inputs(options: argparse.Namespace, num_queries: int):
    rng, shape = np.random.default_rng(0), (options.keys, options.kv_heads, options.head_dim)
    positions = np.sort(rng.choice(options.keys, num_queries, replace=False)).astype(np.int32)
    q, k, v = (
        jnp.asarray(rng.standard_normal(of, np.float32), options.dtype)
        for of in ((num_queries, options.heads, options.head_dim), shape, shape)
    )
    return (q, k, v, jnp.asarray(positions)), positions


def dense(q, k, v, positions):
    """Masked attention of the same queries with all scores in memory: the rival."""
    mask = jnp.arange(k.shape[0])[None, :] <= positions[:, None]
    return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask[None, None])[0]


def causal(q, k, v, positions):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def cudnn(q, k, v, positions):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation="cudnn")[0]


def tokamax_causal(q, k, v, positions):
    import tokamax

    return tokamax.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def tokamax_positions(q, k, v, positions):
    """The one other kernel of queries at positions of their own; tokamax's public function has no argument for them."""
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    attend = PallasMosaicGpuFlashAttention()
    return attend(q[None], k[None], v[None], is_causal=True, q_indices=positions[None, None])[0]


def in_a_loop(function: Callable) -> Callable:
    """`IN_A_LOOP` calls of attention in one program, each after the last, so that no launch from the host is timed."""

    def run(q, *others):
        return jax.lax.fori_loop(0, IN_A_LOOP, lambda _, out: function(q + 0 * out, *others), jnp.zeros_like(q))

    return run


def with_implementation(name: str) -> Callable:
    return lambda q, k, v, positions: selective_attention(q, k, v, positions, implementation=name)


def attention(options: argparse.Namespace) -> Iterator[Row]:
    """Attention of one query (decoding), few (`reuse`), scattered ones (`blend`) and all (`full`)."""
    queries = {"one": 1, "few": min(32, options.keys), "scattered": int(RATIO * options.keys), "full": options.keys}
    chip = current_target().chip
    for case, num_queries in queries.items():
        arguments, positions = attention_inputs(options, num_queries)
        functions = {name: with_implementation(name) for name in backends()}
        if case == "full":
            functions |= {"causal": causal, "cudnn": cudnn, "tokamax": tokamax_causal}
        else:
            functions |= {"dense": dense, "tokamax": tokamax_positions}
        is_short = case in ("one", "few")
        if is_short:
            functions = {name: in_a_loop(function) for name, function in functions.items()}
        flops = visible_flops(positions, options.heads, options.head_dim)
        read = arguments[1].nbytes + arguments[2].nbytes
        found = measured(functions, arguments, options.repeats, IN_A_LOOP if is_short else 1)
        for name, of in found.items():
            predict = seconds_for_bytes if is_short else seconds_for_flops
            predicted = predict(read if is_short else flops, chip, f"{name} {case}")
            yield {"case": case} | row(name, of, predicted, tflops=flops / 1e9, gb_s=read / 1e6)


def sweep(options: argparse.Namespace) -> Iterator[Row]:
    """Every candidate of block sizes, for the device's first backend."""
    backend, chip = backends()[0], current_target().chip
    if backend == "xla":
        return
    arguments, positions = attention_inputs(options, int(RATIO * options.keys))
    flops = visible_flops(positions, options.heads, options.head_dim)
    predicted = seconds_for_flops(flops, chip, f"{backend} scattered")
    in_use = tuning.SELECTIVE_ATTENTION
    for blocks in CANDIDATES:
        for of in [of for of in in_use if of[0] == backend]:
            in_use[of] = [(jnp.dtype(options.dtype).itemsize, 256, blocks)]
        for found in measured({backend: with_implementation(backend)}, arguments, options.repeats).values():
            yield row(str(blocks), found, predicted, tflops=flops / 1e9)


def blending(options: argparse.Namespace) -> Iterator[Row]:
    """Blending of all layers of a stack in place, as prefills do it."""
    layers, keys, chip = 4, options.keys, current_target().chip
    rows, rng = int(RATIO * keys), np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((layers, n, options.kv_heads, options.head_dim), np.float32), options.dtype)
        for n in (keys, keys, rows, rows)
    ]
    angles = jnp.asarray(rng.uniform(0, 1000, (keys, options.head_dim // 2)), jnp.float32)
    indices = jnp.asarray(np.sort(rng.choice(keys, rows, replace=False)), jnp.int32)
    of_row = options.kv_heads * options.head_dim * jnp.dtype(options.dtype).itemsize
    # The program's arguments live on: it copies their stacks first.
    moved = layers * (6 * keys * of_row + 3 * rows * of_row + 4 * keys * options.head_dim)

    def over_layers(implementation: str) -> Callable:
        def run(k, v, k_fresh, v_fresh, indices, cos, sin):
            how = {"cos": cos, "sin": sin, "implementation": implementation}
            for layer in range(layers):
                k, v = blend_kv(k, v, k_fresh[layer], v_fresh[layer], indices, layer=layer, **how)
            return k, v

        return run

    arguments = (*arrays, indices, jnp.cos(angles), jnp.sin(angles))
    functions = {name: over_layers(name) for name in backends(BLENDING)}
    for name, found in measured(functions, arguments, options.repeats).items():
        yield row(name, found, seconds_for_bytes(moved, chip, name), gb_s=moved / 1e6)
