"""Checks and times the kernels and whole prefills on the device at hand, beside what was predicted.

    python scripts/gpu_bench.py --json gpu.json --profile gpu

Ten minutes on a GPU, from a checkout: it needs what JAX's images for GPUs hold, and this project need not be installed.
Each part runs in processes of its own with a time limit; one that fails or does not end is reported, and the others go
on. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, the rival, needs memory too
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from cacheblend_jax.evaluation.shapes import SHAPES
from pallas_kernels.dispatch import current_target
from pallas_kernels.proving.processes import ended
from pallas_kernels.proving.trial import first_line
from scripts.bench_parts import link as delivery
from scripts.bench_parts import models, operations
from scripts.bench_parts.timing import Row


class Part(NamedTuple):
    """What yields a part's rows, and the options whose every value has a process of its own."""

    rows: Callable[[argparse.Namespace], Iterator[Row]]
    each: tuple[str, ...] = ()


PARTS = {
    "check": Part(operations.check),
    "check model": Part(models.check, ("kernels",)),
    "limits": Part(operations.limits),
    "attention": Part(operations.attention),
    "blend_kv": Part(operations.blending),
    "model": Part(models.model, ("shapes", "lengths", "kernels")),
    "stages": Part(models.stages, ("shapes", "lengths", "kernels")),
    "link": Part(delivery.link, ("shapes", "lengths", "kernels")),
    "torch": Part(models.torch, ("shapes",)),
    "sweep": Part(operations.sweep),
}
Tell = Callable[[dict], None]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--shapes", nargs="+", choices=("tiny", *SHAPES), default=["llama-3-8b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192], help="of prompts")
    parser.add_argument("--kernels", nargs="+", choices=("pallas", "xla"), default=["pallas", "xla"], help="of models")
    parser.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="quantise stored KV, for link")
    parser.add_argument("--copy-mb", type=int, default=1024)
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns")
    parser.add_argument("--profile", type=Path, help="folder for the blends' traces and the models' optimised HLO")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--limit", type=float, default=240, help="seconds for each process; 0: all in this one, no limit"
    )
    parser.add_argument("--lines", action="store_true", help="print rows as lines of JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    report: dict = {"jax": jax.__version__, "arguments": {key: str(value) for key, value in vars(options).items()}}

    def tell(part: str, said: dict) -> None:
        if "row" in said:
            report[part].append(said["row"])
        else:
            report.update(said)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
        if options.lines:
            print(json.dumps(said), flush=True)

    for part in options.only:
        start, report[part] = time.perf_counter(), []
        for case in cases(part, options):
            run = (
                partial(in_a_process, part, arguments, options.limit) if options.limit else partial(here, part, options)
            )
            run(case, partial(tell, part))
        if not options.lines:
            print(f"--- {part} ({time.perf_counter() - start:.0f} s) on {report.get('device')}", flush=True)
            print_table(report[part])
    return report


def cases(part: str, options: argparse.Namespace) -> Iterator[dict[str, list]]:
    """The values of options that a part runs with, each in a process of its own."""
    each = PARTS[part].each
    for values in itertools.product(*(getattr(options, name) for name in each)):
        yield {name: [value] for name, value in zip(each, values, strict=True)}


def here(part: str, options: argparse.Namespace, case: dict[str, list], tell: Tell) -> None:
    """Runs one case of a part in this process."""
    try:
        tell({"device": str(current_target())})
        for row in PARTS[part].rows(argparse.Namespace(**vars(options) | case)):
            tell({"row": row})
    except Exception as error:  # the others are worth having all the same
        tell({"row": {"name": part, "error": first_line(error)}})


def in_a_process(part: str, arguments: list[str], limit: float, case: dict[str, list], tell: Tell) -> None:
    """Runs one case of a part in a process that ends within `limit` seconds."""
    command = [sys.executable, __file__, *arguments]
    for name, (value,) in case.items():
        command += [f"--{name}", str(value)]
    command += ["--only", part, "--limit", "0", "--lines", "--json", os.devnull]
    end = ended(command, os.environ, limit, heard=tell)
    if end.is_failure:
        tell({"row": {"name": part} | {name: value for name, (value,) in case.items()} | {"error": end.how}})


def print_table(rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells if rows else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
