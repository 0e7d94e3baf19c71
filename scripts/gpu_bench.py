"""Checks and times the kernels and whole prefills on the device at hand, beside what was predicted.

    python scripts/gpu_bench.py --json gpu.json

Ten minutes on a GPU. Each part runs in a process of its own with a time limit; one that fails or does not end is
reported, and the others go on. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, the rival, needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.engine.planner import computed_positions
from cacheblend_jax.evaluation.device_profile import time_by_stage
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.torch_peer import torch_model
from cacheblend_jax.evaluation.whole_prefills import RATIO, Mode, config_of, kernels, prefills, whole_blend_error
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import random_params
from pallas_kernels import blend_kv, selective_attention, tuning
from pallas_kernels.attention import api as attention
from pallas_kernels.attention.reference import selective_attention_reference
from pallas_kernels.blending import api as blending
from pallas_kernels.blending.reference import blend_kv_reference
from pallas_kernels.dispatch import current_target
from pallas_kernels.proving.trial import first_line
from pallas_kernels.tuning import AttentionBlocks

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "TPU v5 lite": 197e12}  # dense bfloat16
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "TPU v5 lite": 0.82e12}  # bytes/s
# What we expect, as a share of the peak: of attention at 8k keys, of prefills, and of bandwidth.
PREDICTED_SHARE = {
    "mosaic_gpu": 0.55,
    "triton": 0.35,
    "tpu": 0.4,
    "xla": 0.1,
    "matmul": 0.75,
    "full": 0.6,
    "blend": 0.5,
}
PREDICTED_SHARE |= {"cudnn": 0.65, "tokamax": 0.6, "causal": 0.1, "dense": 0.05, "torch sdpa": 0.5, "torch full": 0.55}
PREDICTED_OTHER = 0.05  # of a blend's time is neither matmul nor attention
PREDICTED_BANDWIDTH = {"copy": 0.9, "triton": 0.8, "tpu": 0.7, "xla": 0.6}
IN_A_LOOP = 50  # calls of attention so short that launching one from the host takes longer
CANDIDATES = [
    AttentionBlocks(rows, keys, stages) for rows, keys, stages in itertools.product((128,), (64, 128), (2, 3, 4))
]


def visible_flops(positions: np.ndarray, heads: int, head_dim: int) -> int:
    """Multiply-adds, counted as two, of the scores that the queries see and of their weighted values."""
    return 4 * heads * head_dim * int((positions + 1).sum())


def predicted_seconds(flops: int, chip: str, name: str) -> float | None:
    """What we expect of a backend or a mode on a chip; `None` where there is no prediction."""
    return _predicted(flops, PEAK_FLOPS, PREDICTED_SHARE, chip, name)


def _predicted(amount: float, peaks: dict, shares: dict, chip: str, name: str) -> float | None:
    peak = next((peak for of, peak in peaks.items() if of in chip), None)
    return None if peak is None or name not in shares else amount / (peak * shares[name])


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
    out = jax.jit(partial(selective_attention, implementation=implementation))(q, k, v, positions)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (q, k, v)]
        wanted, _ = jax.jit(selective_attention_reference)(*exact, positions)
        return float(np.abs(np.asarray(out, np.float64) - np.asarray(wanted)).max())


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


def measure(functions: dict[str, Callable], arguments, repeats: int) -> dict[str, dict]:
    """Medians of interleaved rounds, and temporary memory by the compiler's account."""
    compiled, results = {}, {}
    for name, function in functions.items():
        try:
            compiled[name] = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(compiled[name](*arguments))
        except Exception as error:  # a rival that this device lacks must not end the run
            results[name] = {"error": first_line(error)}
    seconds = interleaved({name: lambda run=run: run(*arguments) for name, run in compiled.items()}, repeats)
    for name, run in compiled.items():
        memory = run.memory_analysis().temp_size_in_bytes
        results[name] = seconds[name] | {"temporary_mb": memory / 1e6}
    return results


def interleaved(runs: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Median, fastest and slowest of each; short ones are called many times in a row, since a launch takes its own."""
    calls, seconds = {}, {name: [] for name in runs}
    for name, run in runs.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = int(np.clip(0.02 / max(time.perf_counter() - start, 1e-9), 1, 100)) if repeats > 1 else 1
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = run()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {
        name: {"ms": 1e3 * statistics.median(of), "ms_fastest": 1e3 * min(of), "ms_slowest": 1e3 * max(of)}
        for name, of in seconds.items()
    }


def backends(operation: str = "selective_attention") -> tuple[str, ...]:
    own = {"selective_attention": attention, "blend_kv": blending}[operation].BACKENDS
    platform = current_target().platform
    return (*(name for name in own if (name == "tpu") == (platform == "tpu") and platform != "cpu"), "xla")


def with_implementation(name: str) -> Callable:
    return lambda q, k, v, positions: selective_attention(q, k, v, positions, implementation=name)


def bench_attention(options: argparse.Namespace) -> Iterator[dict]:
    """Times attention of one query (decoding), few (`reuse`), scattered ones (`blend`) and all (`full`)."""
    queries = {"one": 1, "few": min(32, options.keys), "scattered": int(0.15 * options.keys), "full": options.keys}
    for case, num_queries in queries.items():
        arguments = inputs(num_queries, options.keys, options.heads, options.kv_heads, options.head_dim, options.dtype)
        functions = {name: with_implementation(name) for name in backends()}
        if case == "full":
            functions |= {"causal": causal, "cudnn": cudnn, "tokamax": tokamax_causal}
        else:
            functions |= {"dense": dense, "tokamax": tokamax_positions}
        is_short = case in ("one", "few")
        calls = IN_A_LOOP if is_short else 1
        if is_short:
            functions = {name: in_a_loop(function) for name, function in functions.items()}
        flops = visible_flops(np.asarray(arguments[3], np.int64), options.heads, options.head_dim)
        for name, result in measure(functions, arguments, options.repeats).items():
            result |= {key: result[key] / calls for key in ("ms", "ms_fastest", "ms_slowest") if key in result}
            # Few queries are bound by reading the keys and values, for which nothing is predicted.
            predicted = None if is_short else predicted_seconds(flops, current_target().chip, name)
            yield {"case": case} | _row(name, result, predicted, tflops=flops / 1e9)


def sweep(options: argparse.Namespace) -> Iterator[dict]:
    """Times every candidate of block sizes for the platform's first backend."""
    backend = backends()[0]
    if backend == "xla":
        return
    arguments = inputs(
        int(0.15 * options.keys), options.keys, options.heads, options.kv_heads, options.head_dim, options.dtype
    )
    flops = visible_flops(np.asarray(arguments[3], np.int64), options.heads, options.head_dim)
    predicted = predicted_seconds(flops, current_target().chip, backend)
    for blocks in CANDIDATES:
        size = jnp.dtype(options.dtype).itemsize
        tuning.SELECTIVE_ATTENTION[backend, ""] = [(size, 256, blocks)]
        result = measure({str(blocks): with_implementation(backend)}, arguments, options.repeats)
        yield from (_row(name, timing, predicted) for name, timing in result.items())


# --- the device's own limits, and blending -------------------------------------------------------------------------


def check(options: argparse.Namespace) -> Iterator[dict]:
    """Small cases only: `python -m pallas_kernels.proving` tries the kernels hard."""
    models = ("pallas", "xla") if len(backends()) > 1 else ("xla",)  # no interpreter
    rows = [{"name": name, "op": "selective_attention", "call": (largest_error, name)} for name in backends()]
    rows += [{"name": name, "op": "blend_kv", "call": (blend_error, name)} for name in backends("blend_kv")]
    rows += [{"name": name, "op": "whole blend", "call": (whole_blend_error, name)} for name in models]
    for row in rows:
        function, name = row.pop("call")
        try:
            row["error_to_reference"] = function(name, options.dtype)
        except Exception as error:
            row["error"] = first_line(error)
        yield row


def limits(options: argparse.Namespace) -> Iterator[dict]:
    chip, size, n = current_target().chip, options.copy_mb * 10**6 // 4, options.matmul
    x, a = jnp.ones(size, jnp.float32), jnp.ones((n, n), options.dtype)
    copy = measure({"copy": lambda x: x + 1}, (x,), options.repeats)["copy"]
    product = measure({"matmul": lambda a, b: a @ b}, (a, a), options.repeats)["matmul"]
    moved, flops = 8 * size, 2 * n**3
    yield _row("copy", copy, _predicted(moved, BANDWIDTH, PREDICTED_BANDWIDTH, chip, "copy"), gb_s=moved / 1e6)
    yield _row("matmul", product, predicted_seconds(flops, chip, "matmul"), tflops=flops / 1e9)


def _row(name: str, result: dict, predicted: float | None, **amounts: float) -> dict:
    """A row whose `amounts` (of a millisecond's work) become rates."""
    rates = {key: amount / result["ms"] for key, amount in amounts.items()} if "ms" in result else {}
    return {"name": name, "predicted_ms": predicted and 1e3 * predicted} | result | rates


def blend_inputs(keys: int, rows: int, kv_heads: int, head_dim: int, dtype: str, layers: int | None = None):
    rng = np.random.default_rng(0)
    stack = () if layers is None else (layers,)
    cached, fresh = (
        [jnp.asarray(rng.standard_normal((*stack, tokens, kv_heads, head_dim)), dtype) for _ in "kv"]
        for tokens in (keys, rows)
    )
    angles = rng.uniform(0, 1000, (keys, head_dim // 2))
    indices = jnp.asarray(np.sort(rng.choice(keys, rows, replace=False)), jnp.int32)
    return *cached, *fresh, indices, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def blend_error(implementation: str, dtype: str) -> float:
    """Largest absolute error of the blended keys against float64; infinite where the values are not the same bits."""
    *arrays, indices, cos, sin = blend_inputs(300, 40, 2, 64, dtype)
    blend = jax.jit(partial(blend_kv, implementation=implementation))
    k, v = blend(*arrays, indices, cos=cos, sin=sin)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (*arrays, cos, sin)]
        wanted_k, wanted_v = jax.jit(blend_kv_reference)(*exact[:4], indices, cos=exact[4], sin=exact[5])
        same = np.array_equal(np.asarray(v, np.float64), np.asarray(wanted_v))
        return float(np.abs(np.asarray(k, np.float64) - np.asarray(wanted_k)).max()) if same else float("inf")


def bench_blend_kv(options: argparse.Namespace) -> Iterator[dict]:
    """Blending of all layers of a stack in place, as prefills do it."""
    layers, keys, chip = 4, options.keys, current_target().chip
    arguments = blend_inputs(keys, int(RATIO * keys), options.kv_heads, options.head_dim, options.dtype, layers)
    row = options.kv_heads * options.head_dim * jnp.dtype(options.dtype).itemsize
    moved = 2 * keys * row + 3 * int(RATIO * keys) * row + 4 * keys * options.head_dim

    def over_layers(implementation: str) -> Callable:
        def run(k, v, k_fresh, v_fresh, indices, cos, sin):
            options = {"cos": cos, "sin": sin, "implementation": implementation}
            for layer in range(layers):
                k, v = blend_kv(k, v, k_fresh[layer], v_fresh[layer], indices, layer=layer, **options)
            return k, v

        return run

    results = measure({name: over_layers(name) for name in backends("blend_kv")}, arguments, options.repeats)
    # The program's arguments live on: it copies their stacks first.
    moved = layers * (moved + 4 * keys * row)
    for name, result in results.items():
        yield _row(name, result, _predicted(moved, BANDWIDTH, PREDICTED_BANDWIDTH, chip, name), gb_s=moved / 1e6)


# --- whole prefills ------------------------------------------------------------------------------------------------


def bench_model(options: argparse.Namespace) -> Iterator[dict]:
    """Times `full` and `blend`, and says how long they took to compile, both at the same time."""
    chip = current_target().chip
    for shape in options.shapes:
        config = config_of(shape, options.dtype)
        params = random_params(jax.random.key(0), config)
        for implementation in options.kernels:
            with kernels(implementation), ThreadPoolExecutor(len(options.lengths)) as pool:  # most of it is compiling
                compiling = {length: pool.submit(prefills, config, length, params) for length in options.lengths}
            for length, made in compiling.items():
                case = f"{shape} {length} {implementation}"
                try:
                    yield from _model_rows(options, config, case, made.result(), chip)
                except Exception as error:  # too long for this card, say
                    yield {"case": case, "name": "prefill", "error": first_line(error)}


def _model_rows(options: argparse.Namespace, config: ModelConfig, case: str, modes: dict[str, Mode], chip: str):
    flops = {}
    for name, mode in modes.items():
        flops[name] = prefill_flops(config, computed_positions(mode.plan, mode.run().stage_positions))
    times = interleaved({name: mode.run for name, mode in modes.items()}, options.repeats)
    rows = []
    for name, result in times.items():
        predicted = predicted_seconds(flops[name], chip, name)
        row = _row(name, result, predicted, tflops=flops[name] / 1e9)
        rows.append({"case": case} | row | {"compile_s": modes[name].compile_s})
    speedup = times["full"]["ms"] / times["blend"]["ms"]
    rows[-1] |= {"speedup": speedup, "efficiency": speedup / (flops["full"] / flops["blend"])}
    return rows


def bench_stages(options: argparse.Namespace) -> Iterator[dict]:
    """Where the blend's time goes, at the second of the lengths, and how much of it is neither matmul nor attention."""
    length = options.lengths[min(1, len(options.lengths) - 1)]
    for shape, implementation in itertools.product(options.shapes, options.kernels):
        config = config_of(shape, options.dtype)
        params = random_params(jax.random.key(0), config)
        case = f"{shape} {length} {implementation}"
        with kernels(implementation):
            blend = prefills(config, length, params, ("blend",))["blend"]
        directory = options.profile and options.profile / case.replace(" ", "-")
        spent = time_by_stage(blend.run, blend.program, directory)
        yield from ({"case": case} | row for row in spent)
        other = sum(row["share"] for row in spent if row["kind"] not in ("matmul", "attention"))
        whole = {"case": case, "stage": "all", "kind": "neither matmul nor attention", "share": other}
        yield whole | {"predicted_share": PREDICTED_OTHER}


def bench_torch(options: argparse.Namespace) -> Iterator[dict]:
    """Torch's causal attention, and full prefill of the same models by transformers + torch, both with sdpa."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    q, k, v = (
        torch.randn(1, heads, options.keys, options.head_dim, device=device, dtype=dtype)
        for heads in (options.heads, options.kv_heads, options.kv_heads)
    )

    def attend():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        float(out[0, 0, 0, 0])  # waits for the device

    flops = visible_flops(np.arange(options.keys, dtype=np.int64), options.heads, options.head_dim)
    chip = current_target().chip
    predicted = predicted_seconds(flops, chip, "torch sdpa")
    yield _row("torch sdpa", interleaved({"torch": attend}, options.repeats)["torch"], predicted, tflops=flops / 1e9)
    for shape in options.shapes:
        config = config_of(shape, options.dtype)
        model = torch_model(config, device)

        def full(ids, model=model):
            with torch.no_grad():
                return int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

        for length in options.lengths:
            ids = torch.randint(config.vocab_size, (1, length), device=device)
            flops = prefill_flops(config, [np.arange(length)] * config.num_layers)
            try:
                result = interleaved({"torch": partial(full, ids)}, options.repeats)["torch"]
            except torch.OutOfMemoryError as error:
                result = {"error": first_line(error)}
            predicted = predicted_seconds(flops, chip, "torch full")
            yield {"case": f"{shape} {length}"} | _row("torch full", result, predicted, tflops=flops / 1e9)


PARTS = {
    "check": check,
    "limits": limits,
    "attention": bench_attention,
    "blend_kv": bench_blend_kv,
    "model": bench_model,
    "stages": bench_stages,
    "torch": bench_torch,
    "sweep": sweep,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=("tiny", *SHAPES), default=["llama-3-8b", "qwen3-4b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768], help="of prompts")
    parser.add_argument("--kernels", nargs="+", choices=("pallas", "xla"), default=["pallas", "xla"], help="of models")
    parser.add_argument("--copy-mb", type=int, default=1024)
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns")
    parser.add_argument("--profile", type=Path, help="folder for the traces of the blends")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=240, help="seconds for each part; 0: in this process, no limit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    report: dict = {"jax": jax.__version__, "arguments": {key: str(value) for key, value in vars(options).items()}}
    for part in options.only:
        start = time.perf_counter()
        if options.limit:
            report |= in_a_process(part, arguments, options.limit)
        else:
            run_part(part, options, report)
        print(f"--- {part} ({time.perf_counter() - start:.0f} s) on {report.get('device')}", flush=True)
        print_table(report[part])
        _write(report, options.json)
    return report


def run_part(part: str, options: argparse.Namespace, report: dict) -> None:
    """Adds a part's rows to the report, one by one."""
    rows = report[part] = []
    report["device"] = str(current_target())
    try:
        for row in PARTS[part](options):
            rows.append(row)
            _write(report, options.json)
    except Exception as error:  # the other parts are worth having all the same
        rows.append({"name": part, "error": first_line(error)})


def in_a_process(part: str, arguments: list[str], limit: float) -> dict:
    """Returns what a part adds to the report, run by a process that ends within `limit` seconds."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "part.json")
        command = [sys.executable, __file__, *arguments, "--only", part, "--json", str(path), "--limit", "0"]
        error = None
        try:
            status = subprocess.run(command, timeout=limit, stdout=subprocess.DEVNULL).returncode
            if status:
                error = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            error = f"did not end within {limit:g} s"
        report = json.loads(path.read_text()) if path.exists() else {}
    rows = [*report.get(part, []), *([] if error is None else [{"name": part, "error": error}])]
    return {part: rows} | ({"device": report["device"]} if "device" in report else {})


def _write(report: dict, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1))


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells if rows else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
