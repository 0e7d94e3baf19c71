"""The command `demo`: asks the bundled model a dozen questions in every mode."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cacheblend_jax.cli.options import add_shared_options, load_with_bar
from cacheblend_jax.cli.progress import progress


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `demo` to the command line's commands."""
    parser = commands.add_parser("demo", help="ask the bundled model in every mode")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw quality against ratio, and deviation")
    add_shared_options(parser)
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Asks, prints a table and one worked example, and draws; returns what `--json` writes."""
    from cacheblend_jax.engine.kernels import with_kernels
    from cacheblend_jax.evaluation.demo import demo, ratio_curves, worked_example
    from cacheblend_jax.evaluation.tables import demo_table, worked_example_text

    if parsed.plot is not None:
        from cacheblend_jax.evaluation.figures import make_picture_directory

        make_picture_directory(parsed.plot)
    model = with_kernels(load_with_bar("demo", parsed.dtype), parsed.kernels)
    answers = demo(model, progress=progress)
    print(f"{demo_table(answers)}\n\n{worked_example_text(worked_example(answers))}")
    if parsed.plot is not None:
        from cacheblend_jax.evaluation.plots import draw

        curves = ratio_curves(model, progress=progress)
        for path in draw(parsed.plot, curves.settings, curves.summary, curves.deviation, curves.chunk_lengths):
            print(f"drew {path}")
    return {"questions": len(answers.rows), "summary": answers.summary, "records": answers.records}
