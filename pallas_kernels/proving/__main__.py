"""Proves the kernels on this machine's first GPU or TPU, and prints the verdicts; nothing is remembered.

python -m pallas_kernels.proving --json verdicts.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from pallas_kernels.proving.prove import LIMIT_SECONDS, Outcome, prove
from pallas_kernels.proving.report import failure_line, verdict_lines


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the verdicts there, too")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for each backend")
    options = parser.parse_args()
    began = time.perf_counter()

    def tell(operation: str, backend: str, outcome: Outcome) -> None:
        print(f"--- {operation}, {backend}: {time.perf_counter() - began:.0f} s so far", flush=True)
        print("\n".join(verdict_lines(outcome.verdicts)), flush=True)
        if outcome.reason is not None:
            print(failure_line(operation, backend, outcome.reason), flush=True)

    verdicts = prove(jax.local_devices()[0], limit_seconds=options.limit, progress=tell)
    print(json.dumps(verdicts.identity, indent=1))
    if options.json:
        options.json.write_text(json.dumps(verdicts.record(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
