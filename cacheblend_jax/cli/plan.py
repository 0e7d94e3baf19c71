"""The command `plan`: what a service takes: memory, TTFT, throughput and cost, before anything is bought."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_jax.choices import DEVICES, TIERS
from cacheblend_jax.cli.options import (
    add_kv_dtype_option,
    add_output_options,
    at_least_one,
    size_of_at_least_one,
    size_of_at_least_zero,
)
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.shapes import SHAPES

if TYPE_CHECKING:
    from cacheblend_jax.blend import BlendConfig
    from cacheblend_jax.engine.delays import Tier


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `plan` to the command line's commands."""
    parser = commands.add_parser("plan", help="estimate memory, TTFT, throughput and cost of a service")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="llama-3-8b", help="of the model (default: %(default)s)"
    )
    parser.add_argument("--device", default="H100", help=f"{', '.join(DEVICES)} (default: H100)")
    parser.add_argument("--devices", type=at_least_one, default=1, metavar="N", help="of a replica (default: 1)")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="of `calibrate`, in place of the data sheet's rates"
    )
    parser.add_argument(
        "--context", type=at_least_one, default=8192, metavar="N", help="tokens of a prompt (default: 8192)"
    )
    parser.add_argument("--chunk-tokens", type=at_least_one, default=512, metavar="N", help="of a chunk (default: 512)")
    parser.add_argument(
        "--question-tokens", type=at_least_one, default=64, metavar="N", help="after the chunks (default: 64)"
    )
    parser.add_argument(
        "--requests-per-s", type=float, default=1.0, metavar="R", help="of all replicas together (default: 1)"
    )
    parser.add_argument(
        "--reuse", type=float, default=0.9, metavar="SHARE", help="of a prompt's chunks that are stored (default: 0.9)"
    )
    parser.add_argument(
        "--answer-s", type=float, default=5.0, metavar="S", help="that a request decodes, with its KV (default: 5)"
    )
    _add_storage_options(parser)
    parser.add_argument("--ratio", default="auto", help="recompute ratio, or auto (default: auto)")
    parser.add_argument(
        "--selector", help="how the tokens to recompute are chosen (default: hkvd for auto, else query)"
    )
    parser.add_argument(
        "--price-per-device-hour", type=float, metavar="USD", help="(default: about what clouds ask for the device)"
    )
    add_output_options(parser)
    parser.set_defaults(no_compile_cache=True, shorten=": --context N")
    return parser


def _add_storage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tier",
        nargs="+",
        default=["nvme"],
        metavar="TIER",
        help=f"where stored chunks are: {', '.join(TIERS)}, or NAME:BYTES_PER_S[:LATENCY_S[:USD]], as "
        "in raid:12GB:0.0001:0.1; of several, the cheapest that hides behind recomputing (default: nvme)",
    )
    parser.add_argument(
        "--price-per-gb-month", type=float, metavar="USD", help="of the tier (default: a round figure for its kind)"
    )
    parser.add_argument(
        "--stored-chunks", type=at_least_one, default=100_000, metavar="N", help="different ones (default: 100000)"
    )
    parser.add_argument(
        "--device-bytes",
        type=size_of_at_least_zero,
        default=0,
        metavar="SIZE",
        help="for stored chunks on each device (default: 0)",
    )
    parser.add_argument(
        "--host-bytes",
        type=size_of_at_least_zero,
        default=0,
        metavar="SIZE",
        help="for stored chunks in host memory of each replica (default: 0)",
    )
    add_kv_dtype_option(parser)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Plans, and prints tables; returns what `--json` writes."""
    from cacheblend_jax.engine.profile import Profile
    from cacheblend_jax.evaluation.capacity import plan_capacity
    from cacheblend_jax.evaluation.capacity_table import capacity_table
    from cacheblend_jax.evaluation.deployment import Deployment, Workload
    from cacheblend_jax.evaluation.devices import device_named

    workload = Workload(
        parsed.context,
        parsed.requests_per_s,
        parsed.reuse,
        parsed.chunk_tokens,
        parsed.question_tokens,
        parsed.answer_s,
        parsed.stored_chunks,
    )
    config = SHAPES[parsed.shape]
    deployment = Deployment(
        config,
        device_named(parsed.device),
        parsed.devices,
        blend=_blend(parsed.ratio, parsed.selector),
        kv_dtype=parsed.kv_dtype,
        device_tier_bytes=parsed.device_bytes,
        host_bytes=parsed.host_bytes,
        profile=None if parsed.profile is None else Profile.read(parsed.profile),
        price_per_device_hour=parsed.price_per_device_hour,
    ).with_cheapest([tier_of(text, parsed.price_per_gb_month) for text in parsed.tier], workload)
    plan = plan_capacity(workload, deployment)
    print(capacity_table(parsed.shape, workload, deployment, plan))
    found = asdict(plan) | {"shape": parsed.shape, "device": deployment.device.name, "tier": asdict(deployment.tier)}
    modes = {name: {"binds": mode.binds, "requests_per_s": mode.requests_per_s} for name, mode in plan.modes.items()}
    return found | {"modes": {name: found["modes"][name] | more for name, more in modes.items()}}


def tier_of(text: str, price: float | None = None) -> Tier:
    """Parses a tier: the name of a known one, or `NAME:BYTES_PER_S[:LATENCY_S[:USD]]`; `price` overrides its price.

    Raises:
        CacheBlendError: it is neither.
    """
    from cacheblend_jax.engine.delays import Tier
    from cacheblend_jax.evaluation import deployment

    name, *fields = text.split(":")
    if not fields:
        if name not in TIERS:
            known = ", ".join(TIERS)
            raise CacheBlendError(
                f"unknown tier {text!r}; expected one of {known}, or NAME:BYTES_PER_S[:LATENCY_S[:USD]]"
            )
        tier = deployment.TIERS[name]
    else:
        try:
            speed = size_of_at_least_one(fields[0])
            tier = Tier(name, float(speed), *map(float, fields[1:]))
        except (argparse.ArgumentTypeError, OverflowError, TypeError, ValueError) as error:
            raise CacheBlendError(
                f"--tier {text!r} is not NAME:BYTES_PER_S[:LATENCY_S[:USD]], such as raid:12GB:0.0001:0.1: {error}"
            ) from None
    usual = tier.price_per_gb_month
    cost = price if price is not None else (0.1 if usual is None else usual)
    return Tier(tier.name, tier.bytes_per_s, tier.latency_s, cost)


def _blend(ratio: str, selector: str | None) -> BlendConfig:
    from cacheblend_jax.blend import BlendConfig

    if ratio == "auto":
        return BlendConfig("auto", selector)
    try:
        return BlendConfig(float(ratio), selector)
    except ValueError:
        raise CacheBlendError(f"--ratio must be auto or a number in [0, 1], got {ratio!r}") from None
