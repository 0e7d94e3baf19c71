"""Proves the kernels on this machine's first GPU or TPU, prints the verdicts, and remembers them.

python -m pallas_kernels.proving --json verdicts.json
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

from pallas_kernels.dispatch import BACKENDS
from pallas_kernels.proving.case import HEAD_DIMS
from pallas_kernels.proving.prove import (
    LIMIT_SECONDS,
    Outcome,
    UnprovenError,
    child_command,
    describe_first_device,
    prove,
)
from pallas_kernels.proving.remembered import remember
from pallas_kernels.proving.report import outcome_lines


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the verdicts there, too")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for each backend")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS[1:], help="these alone; nothing is remembered")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, help="likewise")
    options = parser.parse_args()
    command = partial(child_command, head_dims=options.head_dims or HEAD_DIMS)
    began = time.perf_counter()

    def tell(operation: str, backend: str, outcome: Outcome) -> None:
        print(f"--- {operation}, {backend}: {time.perf_counter() - began:.0f} s so far", flush=True)
        print("\n".join(outcome_lines(operation, backend, outcome.verdicts, outcome.reason)), flush=True)

    try:
        place = describe_first_device()
        print(json.dumps(place.identity, indent=1), flush=True)
        verdicts = prove(place, limit_seconds=options.limit, command=command, progress=tell, only=options.backends)
    except UnprovenError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        options.json.write_text(json.dumps(verdicts.record(), indent=1) + "\n", encoding="utf-8")
    if options.backends is None and options.head_dims is None:
        print(f"remembered in {remember(verdicts)}")


if __name__ == "__main__":
    main()
