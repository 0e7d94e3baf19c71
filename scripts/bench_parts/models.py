"""The parts of `gpu_bench.py` that run whole models, of one shape, prompt length and kind of kernels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.blend.schedule import computed_positions
from cacheblend_jax.evaluation.device_profile import time_by_stage
from cacheblend_jax.evaluation.whole_prefills import (
    DECODED,
    MODES,
    Mode,
    config_of,
    decoding,
    kernels,
    prefills,
    whole_blend_error,
)
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import cache_shape
from cacheblend_jax.model.transformer import random_params
from pallas_kernels.dispatch import current_target
from pallas_kernels.proving.trial import first_line
from scripts.bench_parts.operations import visible_flops
from scripts.bench_parts.predictions import OTHER_SHARE, seconds_for_bytes, seconds_for_flops
from scripts.bench_parts.timing import Row, row, timed

# Else kernels inside a command buffer have no names in the profile.
NAMED = {"gpu": {"xla_gpu_enable_command_buffer": ""}}


def check(options: argparse.Namespace) -> Iterator[Row]:
    """A small blend that recomputes everything, against numpy."""
    found = {"op": "whole blend", "name": options.kernels[0]}
    with jax.default_matmul_precision("highest"):
        yield found | {"error_to_reference": whole_blend_error(options.kernels[0], options.dtype)}


def model(options: argparse.Namespace) -> Iterator[Row]:
    """`full`, `blend`, `reuse` and a token of decoding, and how long the programs take to compile beside each other."""
    shape, length, kernel, chip = options.shapes[0], options.lengths[0], options.kernels[0], current_target().chip
    case = f"{shape} {length} {kernel}"
    config = config_of(shape, options.dtype)
    params = random_params(jax.random.key(0), config)
    with kernels(kernel):
        modes = prefills(config, length, params, MODES)
        step = decoding(config, length, params)
    if options.profile:
        for name, mode in (*modes.items(), ("decode", step)):
            keep(options.profile / f"{case.replace(' ', '-')}-{name}.hlo.txt", mode.program.as_text())
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    stored = 2 * int(np.prod(cache_shape(config, length))) * jnp.dtype(config.dtype).itemsize
    flops = {name: flops_of(config, mode) for name, mode in modes.items()}
    expected = {name: seconds_for_flops(flops[name], chip, f"prefill {name}") for name in ("full", "blend")}
    expected["reuse"] = seconds_for_bytes(read + 3 * stored, chip, "prefill reuse")  # read, written, attended to
    times = timed({name: mode.run for name, mode in modes.items()}, options.repeats)
    for name, found in times.items():
        yield (
            {"case": case}
            | row(name, found, expected[name], tflops=flops[name] / 1e9)
            | {
                "compile_s": modes[name].compile_s,
                "speedup": times["full"]["ms"] / found["ms"],
                "efficiency": times["full"]["ms"] / found["ms"] / (flops["full"] / flops[name]),
            }
        )
    found = timed({"decode": step.run}, options.repeats, calls=DECODED)["decode"]
    predicted = seconds_for_bytes(read + stored, chip, "decode")
    yield {"case": case} | row("decode", found, predicted, gb_s=(read + stored) / 1e6) | {"compile_s": step.compile_s}


def flops_of(config: ModelConfig, mode: Mode) -> int:
    return prefill_flops(config, computed_positions(mode.plan, mode.positions, mode.run().later_positions))


def keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stages(options: argparse.Namespace) -> Iterator[Row]:
    """Where the blend's time goes, and how much of it is neither matmul nor attention."""
    shape, length, kernel = options.shapes[0], options.lengths[0], options.kernels[0]
    case, config = f"{shape} {length} {kernel}", config_of(shape, options.dtype)
    params = random_params(jax.random.key(0), config)
    with kernels(kernel):
        blend = prefills(config, length, params, ("blend",), options=NAMED.get(current_target().platform))["blend"]
    directory = options.profile and options.profile / case.replace(" ", "-")
    spent = time_by_stage(blend.run, blend.program, directory)
    yield from ({"case": case} | of for of in spent)
    other = sum(of["share"] for of in spent if of["kind"] not in ("matmul", "attention"))
    yield {"case": case, "stage": "all", "kind": "neither matmul nor attention", "share": other} | {
        "predicted_share": OTHER_SHARE
    }


def torch(options: argparse.Namespace) -> Iterator[Row]:
    """Torch's causal attention, and full prefill of the same model by transformers + torch, both with sdpa."""
    import torch

    from cacheblend_jax.evaluation.torch_peer import torch_model

    device, chip = "cuda" if torch.cuda.is_available() else "cpu", current_target().chip
    q, k, v = (
        torch.randn(1, heads, options.keys, options.head_dim, device=device, dtype=getattr(torch, options.dtype))
        for heads in (options.heads, options.kv_heads, options.kv_heads)
    )

    def attend() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        float(out[0, 0, 0, 0])  # waits for the device

    flops = visible_flops(np.arange(options.keys), options.heads, options.head_dim)
    found = timed({"torch": attend}, options.repeats)["torch"]
    yield row("torch sdpa", found, seconds_for_flops(flops, chip, "torch sdpa"), tflops=flops / 1e9)
    config = config_of(options.shapes[0], options.dtype)
    peer: Any = torch_model(config, device)

    @torch.no_grad()
    def full(ids: torch.Tensor) -> None:
        int(peer(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    for length in options.lengths:
        ids = torch.randint(config.vocab_size, (1, length), device=device)
        flops = prefill_flops(config, [np.arange(length)] * config.num_layers)
        try:
            found = timed({"torch": partial(full, ids)}, options.repeats)["torch"]
        except torch.OutOfMemoryError as error:
            found = {"error": first_line(error)}
        predicted = seconds_for_flops(flops, chip, "torch full")
        yield {"case": f"{options.shapes[0]} {length}"} | row("torch full", found, predicted, tflops=flops / 1e9)
