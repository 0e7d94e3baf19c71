"""Makes faults on purpose, for as long as asked, and counts what came of them; the tests run a few rounds of each.

    python scripts/fault_harness.py flips --rounds 200
    nice -n 19 python scripts/fault_harness.py all --minutes 5 --seed 7 --json faults.json

Exits with 1 where a fault led to a wrong answer, a crash, or damage that stays; the summary then names its round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest  # noqa: F401  (annotations are checked here as in the tests, and programs compiled as quickly)
from faults import WrongAnswerError
from faults.directory import flips, hammer, head_flips, index_flips, kills, quantised_flips
from faults.interrupts import interrupts
from faults.prefills import fuzz, threads
from faults.serving import requests

KINDS: dict[str, Callable[..., dict[str, int]]] = {
    "flips": flips,
    "quantised-flips": quantised_flips,
    "head-flips": head_flips,
    "index-flips": index_flips,
    "kills": kills,
    "hammer": hammer,
    "fuzz": fuzz,
    "threads": threads,
    "interrupts": interrupts,
    "requests": requests,
}


def rounds_until(count: int | None, seconds: float) -> Iterator[int]:
    """Yields 0, 1, … until the count is reached, or the time is over."""
    deadline = time.monotonic() + seconds
    for round_ in itertools.count() if count is None else range(count):
        if count is None and time.monotonic() >= deadline:
            return
        yield round_


def run_kind(kind: str, parsed: argparse.Namespace) -> dict[str, Any]:
    began, wrong = time.monotonic(), None
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="cacheblend-faults-") as directory:
        try:
            counts = KINDS[kind](Path(directory), rounds_until(parsed.rounds, parsed.minutes * 60), seed=parsed.seed)
        except WrongAnswerError as error:
            wrong = str(error)
    seconds = round(time.monotonic() - began, 1)
    return {"kind": kind, "seed": parsed.seed, "seconds": seconds, "counts": counts, "wrong": wrong}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="KIND")
    for name, run in KINDS.items():
        _add_options(kinds.add_parser(name, help=(run.__doc__ or name).splitlines()[0]))
    _add_options(kinds.add_parser("all", help="each of them in turn"))
    parsed = parser.parse_args(arguments)
    reports = []
    for kind in KINDS if parsed.kind == "all" else [parsed.kind]:
        reports.append(run_kind(kind, parsed))
        print(json.dumps(reports[-1]), flush=True)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(reports, indent=1) + "\n")
    return int(any(report["wrong"] for report in reports))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="how many of each kind; by default as many as the time allows")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each kind (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary")


if __name__ == "__main__":
    logging.getLogger("cacheblend_jax").setLevel(logging.ERROR)  # damage is what is made here
    sys.exit(main())
