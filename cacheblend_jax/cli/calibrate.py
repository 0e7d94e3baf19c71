"""The command `calibrate`: measures what `ask --ratio auto` decides by, and saves it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cacheblend_jax.cli.options import add_model_option, add_shared_options, at_least_one, check_writable, load_with_bar
from cacheblend_jax.cli.progress import progress


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `calibrate` to the command line's commands."""
    parser = commands.add_parser("calibrate", help="measure what --ratio auto decides by: layer steps and tiers")
    add_model_option(parser)
    parser.add_argument("--store", metavar="DIR", help="the store whose disk is measured (default: none, memory only)")
    parser.add_argument(
        "--lengths",
        type=at_least_one,
        nargs="+",
        default=[512, 1024, 2048, 4096],
        metavar="N",
        help="tokens in chunks (default: 512 1024 2048 4096)",
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.15, 0.5], metavar="R", help="recompute ratios (default: 0.15 0.5)"
    )
    parser.add_argument("--repeats", type=at_least_one, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to save the profile (default: where engines look for it)"
    )
    add_shared_options(parser)
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Calibrates, saves the profile and prints what was found; returns what `--json` writes."""
    from cacheblend_jax.engine.kernels import with_kernels
    from cacheblend_jax.engine.profile import default_path
    from cacheblend_jax.evaluation.calibrate import calibrate
    from cacheblend_jax.evaluation.tables import profile_text

    if parsed.out is not None and parsed.out.parent.is_dir():  # a directory that is missing is made
        check_writable("--out", parsed.out)
    model = with_kernels(load_with_bar(parsed.model, parsed.dtype), parsed.kernels)
    profile = calibrate(
        model,
        parsed.store,
        lengths=parsed.lengths,
        ratios=parsed.ratios,
        repeats=parsed.repeats,
        progress=progress,
    )
    path = parsed.out or default_path(model, parsed.store)
    profile.save(path)
    print(f"{profile_text(profile)}\nsaved {path}")
    fit = {name: value for name, value in profile.fit.items() if name != "layers"}  # not the single measurements
    return asdict(replace(profile, fit=fit)) | {"saved": str(path)}
