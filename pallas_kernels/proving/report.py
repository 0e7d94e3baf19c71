"""Verdicts as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pallas_kernels.verdicts import Verdict


def verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    """Returns a line for each operation, backend, dtype and head_dim: its error, and its speed by class of shapes."""
    by_kind = groupby(verdicts, key=lambda of: (of.operation, of.backend, of.dtype, of.head_dim))
    return [
        f"{operation:<20} {backend:<11} {dtype:<9} {head_dim:>4}  {_finding(list(of_kind))}"
        for (operation, backend, dtype, head_dim), of_kind in by_kind
    ]


def _finding(of_kind: Sequence[Verdict]) -> str:
    problems = list(dict.fromkeys(verdict.problem for verdict in of_kind if verdict.problem))
    error = next((verdict.error for verdict in of_kind if verdict.error is not None), None)
    parts = [] if error is None else [f"error {error:4.2f} of rounding's"]
    for verdict in of_kind:
        if verdict.speedup is not None and verdict.seconds is not None:
            use = "used" if verdict.is_chosen else "xla is"
            parts.append(f"{verdict.shapes} {verdict.speedup:.2f}x ({1e3 * verdict.seconds:.3g} ms, {use})")
    return "; ".join([*parts, *problems])


def failure_line(operation: str, backend: str, reason: str) -> str:
    """Returns the line on a backend whose check did not come to its end."""
    return f"{operation:<20} {backend:<11} not used: it {reason}"
