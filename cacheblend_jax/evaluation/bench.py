"""`bench`: the modes timed against each other in one process, interleaved, on the same prompts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model, ModelConfig, RopeConfig, load_model, random_model
from cacheblend_jax.model.weights import hugging_face_tensors
from cacheblend_jax.store import ChunkStore

PAUSE_S = 0.3  # before each run: a runtime's threads keep spinning for a while after their last work
SHAPES = {
    "bench-16l": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_positions=32768,
    ),
    "llama-3-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=131072,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
        dtype="bfloat16",
    ),
    "qwen3-4b": ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=40960,
        rope=RopeConfig(theta=1e6),
        qk_norm=True,
        tied_embeddings=True,
        dtype="bfloat16",
    ),
}


def run_bench(parsed: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Times every mode and ratio at every length; prints a table and returns what `--json` writes."""
    _check_sizes(parsed)
    if parsed.model is not None:
        model = load_model(parsed.model, dtype=parsed.dtype)
    else:
        shape = SHAPES[parsed.shape]
        model = random_model(shape if parsed.dtype is None else replace(shape, dtype=parsed.dtype))
    rows = []
    for tokens in parsed.tokens:
        rows += _bench_length(parsed, model, tokens, say)
    _print_table(rows)
    device = jax.tree.leaves(model.params)[0].devices().pop()
    return {"model": parsed.model or parsed.shape, "device": device.device_kind, "jax": jax.__version__, "rows": rows}


def _check_sizes(parsed: argparse.Namespace) -> None:
    if parsed.prefix_tokens < 0:
        raise CacheBlendError(f"--prefix-tokens must be at least 0, got {parsed.prefix_tokens}")
    if short := [tokens for tokens in parsed.tokens if tokens < parsed.chunks]:
        raise CacheBlendError(f"--tokens must be at least --chunks ({parsed.chunks}), got {short[0]}")


def _prompt(parsed: argparse.Namespace, vocab_size: int, tokens: int, seed: int = 0) -> Prompt:
    rng = np.random.default_rng([tokens, seed])

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, vocab_size, size).astype(np.int32)

    chunks = [ids(len(part)) for part in np.array_split(np.arange(tokens), parsed.chunks)]
    return Prompt(ids(parsed.prefix_tokens), chunks, ids(parsed.question_tokens))


def _bench_length(parsed: argparse.Namespace, model: Model, tokens: int, say: Callable[[str], None]) -> list[dict]:
    prompt = _prompt(parsed, model.config.vocab_size, tokens)
    store = ChunkStore(host_bytes=64 * 2**30)
    engines = {ratio: Engine(model, store, BlendConfig(ratio, parsed.selector)) for ratio in parsed.ratios}
    first = engines[parsed.ratios[0]]
    say(f"{tokens} tokens: precomputing and compiling")
    first.precompute(prompt)

    def prefill(engine: Engine, mode: str) -> PrefillStats:
        return engine.prefill(prompt, mode).stats

    cases = {mode: partial(prefill, first, mode) for mode in ("full", "prefix", "reuse")}
    cases |= {f"blend {ratio:g}": partial(prefill, engine, "blend") for ratio, engine in engines.items()}
    compile_s = {}
    for name, run in cases.items():
        compile_s[name] = run().compile_s
    peer = _torch_peer(model, prompt, first.prefill(prompt, "full").next_token) if parsed.peer else None
    samples: dict[str, list] = {name: [] for name in cases}
    peer_seconds: list[float] = []
    compiled = model.programs.count
    for repeat in range(parsed.repeats):
        say(f"{tokens} tokens: round {repeat + 1} of {parsed.repeats}")
        for name, run in cases.items():
            time.sleep(PAUSE_S)
            samples[name].append(run())
        if peer is not None:
            time.sleep(PAUSE_S)
            peer_seconds.append(peer())
    # Another prompt of the same lengths: nothing is left to compile.
    prompt = _prompt(parsed, model.config.vocab_size, tokens, seed=1)
    first.precompute(prompt)
    for run in cases.values():
        run()
    recompiled = model.programs.count - compiled
    rows = [_row(name, tokens, stats, samples["full"], compile_s[name]) for name, stats in samples.items()]
    for row in rows:
        row["programs"] = compiled
        row["compiles_after_warmup"] = recompiled
    if peer_seconds:
        median = statistics.median(peer_seconds)
        rows.append({"tokens": tokens, "mode": "torch full", "ttft_s": median, "spread_s": _spread(peer_seconds)})
        rows[0]["over_torch"] = rows[0]["ttft_s"] / median
    return rows


def _row(name: str, tokens: int, stats: list, full: list, compile_s: float) -> dict[str, Any]:
    seconds = [run.ttft_s for run in stats]
    median, full_median = statistics.median(seconds), statistics.median(run.ttft_s for run in full)
    speed_up, ideal = full_median / median, full[0].flops / stats[0].flops
    return {
        "tokens": tokens,
        "mode": name,
        "ttft_s": median,
        "spread_s": _spread(seconds),
        "tokens_per_s": stats[0].tokens / median,
        "speed_up": speed_up,
        "ideal_speed_up": ideal,
        "efficiency": speed_up / ideal,
        "recompute_ratio": stats[0].recompute_ratio,
        "host_share": statistics.median(run.host_s / run.ttft_s for run in stats),
        "load_share": statistics.median(run.load_s / run.ttft_s for run in stats),
        "flops": stats[0].flops,
        "compile_s": compile_s,
        "peak_memory_bytes": stats[0].peak_memory_bytes,
    }


def _spread(seconds: list[float]) -> float:
    """Half the distance between the quartiles."""
    lower, upper = np.percentile(seconds, [25, 75])
    return float(upper - lower) / 2


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'tokens':>7} {'mode':12}{'TTFT ms':>10}{'±':>7}{'speed-up':>10}{'ideal':>7}{'efficiency':>12}"
        f"{'host':>7}{'load':>7}{'compile s':>11}{'peak GB':>9}"
    )
    for row in rows:
        line = f"{row['tokens']:7} {row['mode']:12}{row['ttft_s'] * 1e3:10.1f}{row['spread_s'] * 1e3:7.1f}"
        if "speed_up" in row:
            line += (
                f"{row['speed_up']:9.2f}x{row['ideal_speed_up']:6.2f}x{row['efficiency']:12.3f}"
                f"{row['host_share']:7.1%}{row['load_share']:7.1%}{row['compile_s']:11.1f}"
                f"{row['peak_memory_bytes'] / 1e9:9.2f}"
            )
        print(line)
    for row in rows:
        if row["mode"] == "full":
            print(
                f"{row['tokens']} tokens: {row['programs']} programs compiled; "
                f"{row['compiles_after_warmup']} more for the rounds and for another prompt"
            )
        if "over_torch" in row:
            print(f"full / torch at {row['tokens']} tokens: {row['over_torch']:.2f}")


def torch_model(config: ModelConfig, device: str) -> Any:
    """Returns the same model by transformers + torch (sdpa) on a device of torch's, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    peer_config = AutoConfig.for_model(**config.to_hugging_face())
    with torch.device(device):
        return AutoModelForCausalLM.from_config(peer_config, dtype=dtype, attn_implementation="sdpa").eval()


def _torch_peer(model: Model, prompt: Prompt, next_token: int) -> Callable[[], float]:
    """Full prefill by transformers + torch (sdpa) of the same weights and prompt, on torch's own threads or GPU.

    Raises:
        CacheBlendError: torch is missing, or its next token is not ours.
    """
    try:
        import torch
    except ImportError as error:
        raise CacheBlendError(f"--peer torch needs torch: pip install torch ({error})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = torch_model(model.config, device)
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).to(peer.dtype)
        for name, array in hugging_face_tensors(model.params).items()
    }
    peer.load_state_dict(tensors, strict=not model.config.tied_embeddings)
    ids = torch.from_numpy(np.concatenate([prompt.prefix, *prompt.chunks, prompt.suffix]).astype(np.int64)[None])

    @torch.no_grad()
    def first_token() -> int:
        out = peer(ids.to(device), use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def run() -> float:
        began = time.perf_counter()
        first_token()
        return time.perf_counter() - began

    token = first_token()
    if model.config.dtype == "float32" and token != next_token:
        raise CacheBlendError(f"torch's next token is {token}, ours {next_token}: the two do not compute the same")
    return run
