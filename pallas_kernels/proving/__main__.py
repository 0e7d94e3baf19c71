"""Proves the kernels on this machine's first GPU or TPU, prints the verdicts, and remembers them.

python -m pallas_kernels.proving --json verdicts.json
python -m pallas_kernels.proving --dtypes bfloat16 --head-dims 128  # what one model needs
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pallas_kernels.dispatch import BACKENDS
from pallas_kernels.proving.case import DTYPES, HEAD_DIMS
from pallas_kernels.proving.prove import (
    LIMIT_SECONDS,
    Outcome,
    UnprovenError,
    describe_first_device,
    prove,
    trials_on,
)
from pallas_kernels.proving.remembered import remember
from pallas_kernels.proving.report import outcome_lines
from pallas_kernels.verdicts import Kind


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the verdicts there, too")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for each backend")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS[1:], default=BACKENDS[1:], help="these alone")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="likewise")
    parser.add_argument("--head-dims", nargs="+", type=_head_dim, default=HEAD_DIMS, help="likewise; any, as 112")
    options = parser.parse_args()
    kinds = [Kind(dtype, head_dim) for dtype in options.dtypes for head_dim in sorted(set(options.head_dims))]
    began = time.perf_counter()

    def tell(operation: str, backend: str, outcome: Outcome) -> None:
        print(f"--- {operation}, {backend}: {time.perf_counter() - began:.0f} s so far", flush=True)
        print("\n".join(outcome_lines(operation, backend, outcome.verdicts, outcome.reason)), flush=True)

    try:
        place = describe_first_device()
        print(json.dumps(place.identity, indent=1), flush=True)
        trials = [trial for trial in trials_on(place.target, kinds) if trial.backend in options.backends]
        verdicts = prove(place, trials, limit_seconds=options.limit, progress=tell)
    except UnprovenError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        options.json.write_text(json.dumps(verdicts.record(), indent=1) + "\n", encoding="utf-8")
    try:
        print(f"remembered in {remember(verdicts)}")
    except OSError as error:
        raise SystemExit(f"the verdicts can't be remembered: {error}; set XDG_CACHE_HOME") from None


def _head_dim(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"head_dim must be a whole number from 1 on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
