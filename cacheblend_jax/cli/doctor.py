"""The command `doctor`: shows devices, versions and what was found of the kernels, and proves them again."""

from __future__ import annotations

import argparse
from typing import Any

from cacheblend_jax.cli.options import add_output_options, print_status


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `doctor` to the command line's commands."""
    parser = commands.add_parser("doctor", help="show devices, versions, and which kernels are used and why")
    parser.add_argument(
        "--prove", action="store_true", help="check and time the kernels of this GPU or TPU again; takes minutes"
    )
    add_output_options(parser)
    parser.set_defaults(no_compile_cache=True)
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Looks, and proves where asked; prints what was found and returns what `--json` writes."""
    from cacheblend_jax.evaluation.doctor import diagnose

    found = diagnose(prove_again=parsed.prove, say=print_status)
    print(", ".join(f"{name} {version}" for name, version in found.versions.items()))
    for device in found.devices:
        print("\n".join(device.lines))
    return found.record()
