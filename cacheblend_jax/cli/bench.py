"""The command `bench`: times the modes against each other."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cacheblend_jax.cli.options import (
    add_kv_dtype_option,
    add_shared_options,
    at_least_one,
    load_with_bar,
    print_status,
)
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.shapes import SHAPES

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.model import Model


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `bench` to the command line's commands."""
    parser = commands.add_parser("bench", help="time the modes against each other")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory, hub id or .gguf file")
    source.add_argument(
        "--shape", choices=sorted(SHAPES), default="bench-16l", help="with random weights (default: bench-16l)"
    )
    parser.add_argument(
        "--tokens", type=at_least_one, nargs="+", default=[4096], metavar="N", help="tokens in chunks (default: 4096)"
    )
    parser.add_argument("--chunks", type=at_least_one, default=8, metavar="N", help="equal chunks (default: 8)")
    parser.add_argument(
        "--prefix-tokens", type=int, default=0, metavar="N", help="tokens before the chunks (default: 0)"
    )
    parser.add_argument(
        "--question-tokens", type=at_least_one, default=32, metavar="N", help="tokens after the chunks (default: 32)"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (default: 0.15)"
    )
    parser.add_argument("--selector", default="query", help="how the tokens to recompute are chosen (default: query)")
    parser.add_argument("--repeats", type=at_least_one, default=7, metavar="N", help="interleaved rounds (default: 7)")
    parser.add_argument("--peer", choices=("torch",), help="also time full prefill by transformers and torch")
    add_kv_dtype_option(parser)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --tokens N")
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Times, and prints a table; returns what `--json` writes."""
    from cacheblend_jax.evaluation.bench import bench
    from cacheblend_jax.evaluation.tables import bench_table

    _check(parsed)
    report = bench(
        _model(parsed),
        tokens=parsed.tokens,
        chunks=parsed.chunks,
        prefix_tokens=parsed.prefix_tokens,
        question_tokens=parsed.question_tokens,
        ratios=parsed.ratios,
        selector=parsed.selector,
        repeats=parsed.repeats,
        peer=parsed.peer,
        kv_dtype=parsed.kv_dtype,
        announce=print_status,
    )
    print(bench_table(report))
    name = parsed.model or parsed.shape
    return {"model": name, "device": report.device, "jax": report.jax, "rows": report.rows}


def _check(parsed: argparse.Namespace) -> None:
    """Refuses what makes no sense before a model is loaded."""
    from cacheblend_jax.blend import BlendConfig

    if parsed.prefix_tokens < 0:
        raise CacheBlendError(f"--prefix-tokens must be at least 0, got {parsed.prefix_tokens}")
    if short := [tokens for tokens in parsed.tokens if tokens < parsed.chunks]:
        raise CacheBlendError(f"--tokens must be at least --chunks ({parsed.chunks}), got {short[0]}")
    for ratio in parsed.ratios:
        BlendConfig(ratio, parsed.selector)


def _model(parsed: argparse.Namespace) -> Model:
    from cacheblend_jax.engine.kernels import with_kernels
    from cacheblend_jax.model import random_model

    if parsed.model is not None:
        return with_kernels(load_with_bar(parsed.model, parsed.dtype), parsed.kernels)
    shape = SHAPES[parsed.shape]
    model = random_model(shape if parsed.dtype is None else replace(shape, dtype=parsed.dtype))
    return with_kernels(model, parsed.kernels)
