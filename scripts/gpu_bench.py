"""Checks and times `selective_attention` on the device at hand, beside what was predicted; sweeps block sizes.

    python scripts/gpu_bench.py --only check attention sweep --json gpu.json

On a CPU it times the "xla" path against dense attention: `python scripts/gpu_bench.py --only check attention`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import selective_attention, tuning
from pallas_kernels.dispatch import current_target
from pallas_kernels.selective_attention_reference import selective_attention_reference
from pallas_kernels.tuning import AttentionBlocks

PARTS = ("check", "attention", "sweep")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "TPU v5 lite": 197e12}  # dense bfloat16
PREDICTED_SHARE = {"mosaic_gpu": 0.55, "triton": 0.35, "tpu": 0.4}  # of the peak, at 8k keys
CANDIDATES = [
    AttentionBlocks(rows, keys, stages) for rows, keys, stages in itertools.product((128,), (64, 128), (2, 3, 4))
]


def visible_flops(positions: np.ndarray, heads: int, head_dim: int) -> int:
    """Multiply-adds, counted as two, of the scores that the queries see and of their weighted values."""
    return 4 * heads * head_dim * int((positions + 1).sum())


def predicted_seconds(flops: int, chip: str, backend: str) -> float | None:
    """What we expect of a backend on a chip; `None` where there is no prediction."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in chip), None)
    share = PREDICTED_SHARE.get(backend)
    return None if peak is None or share is None else flops / (peak * share)


def inputs(num_queries: int, num_keys: int, heads: int, kv_heads: int, head_dim: int, dtype: str):
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(num_keys, num_queries, replace=False)).astype(np.int32)
    arrays = [
        jnp.asarray(rng.standard_normal((tokens, n, head_dim)), dtype)
        for tokens, n in ((num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads))
    ]
    return (*arrays, jnp.asarray(positions))


def largest_error(implementation: str | None, dtype: str) -> float:
    """Largest absolute error against float64 on a small case."""
    q, k, v, positions = inputs(100, 300, 4, 2, 64, dtype)
    out = selective_attention(q, k, v, positions, implementation=implementation)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (q, k, v)]
        wanted, _ = selective_attention_reference(*exact, positions)
        return float(np.abs(np.asarray(out, np.float64) - np.asarray(wanted)).max())


def dense(q, k, v, positions):
    """Masked attention of the same queries with all scores in memory: the rival."""
    mask = jnp.arange(k.shape[0])[None, :] <= positions[:, None]
    return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask[None, None])[0]


def causal(q, k, v, positions):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def cudnn(q, k, v, positions):
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation="cudnn")[0]


def measure(functions: dict[str, Callable], arguments, repeats: int) -> dict[str, dict]:
    """Medians of interleaved rounds, and temporary memory by the compiler's account."""
    compiled, results = {}, {}
    for name, function in functions.items():
        try:
            compiled[name] = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(compiled[name](*arguments))
        except Exception as error:  # a rival that this device lacks must not end the run
            results[name] = {"error": str(error).splitlines()[0][:200]}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - start)
    for name, run in compiled.items():
        memory = run.memory_analysis().temp_size_in_bytes
        results[name] = {"ms": 1e3 * statistics.median(seconds[name]), "temporary_mb": memory / 1e6}
    return results


def backends() -> tuple[str, ...]:
    gpu = ("mosaic_gpu", "triton")
    return (*{"gpu": gpu, "tpu": ("tpu",)}.get(current_target().platform, ()), "xla")


def with_implementation(name: str) -> Callable:
    return lambda q, k, v, positions: selective_attention(q, k, v, positions, implementation=name)


def bench_attention(options: argparse.Namespace) -> list[dict]:
    chip, rows = current_target().chip, []
    for label, num_queries in (("scattered", int(0.15 * options.keys)), ("full", options.keys)):
        arguments = inputs(num_queries, options.keys, options.heads, options.kv_heads, options.head_dim, options.dtype)
        functions = {name: with_implementation(name) for name in backends()}
        functions |= {"dense": dense} if label == "scattered" else {"causal": causal, "cudnn": cudnn}
        flops = visible_flops(np.asarray(arguments[3], np.int64), options.heads, options.head_dim)
        for name, result in measure(functions, arguments, options.repeats).items():
            predicted = predicted_seconds(flops, chip, name)
            row = {"case": label, "name": name, "predicted_ms": predicted and 1e3 * predicted} | result
            rows.append(row | ({"tflops": flops / result["ms"] / 1e9} if "ms" in result else {}))
    return rows


def sweep(options: argparse.Namespace) -> list[dict]:
    """Times every candidate of block sizes for the platform's first backend."""
    backend, rows = backends()[0], []
    arguments = inputs(
        int(0.15 * options.keys), options.keys, options.heads, options.kv_heads, options.head_dim, options.dtype
    )
    if backend == "xla":
        return rows
    for blocks in CANDIDATES:
        size = jnp.dtype(options.dtype).itemsize
        tuning.SELECTIVE_ATTENTION[backend, ""] = [(size, 256, blocks)]
        result = measure({str(blocks): with_implementation(backend)}, arguments, options.repeats)
        rows += [{"blocks": name} | timing for name, timing in result.items()]
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    report: dict = {"device": str(current_target()), "jax": jax.__version__}
    if "check" in options.only:
        report["errors"] = {name: largest_error(name, options.dtype) for name in backends()}
    if "attention" in options.only:
        report["attention"] = bench_attention(options)
    if "sweep" in options.only:
        report["sweep"] = sweep(options)
    for row in [*report.get("attention", []), *report.get("sweep", [])]:
        print(
            "  ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
    print({key: value for key, value in report.items() if key not in ("attention", "sweep")})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
