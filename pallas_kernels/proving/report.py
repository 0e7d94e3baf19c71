"""Verdicts as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pallas_kernels.verdicts import Verdict, Verdicts


def report_lines(verdicts: Verdicts) -> list[str]:
    """Returns a line for each operation, backend, dtype and head_dim, and those that failed at once in one line."""
    failed: dict[tuple[str, str, str], list[str]] = {}
    for trial in verdicts.trials:
        if trial.failure is not None:
            at_once = failed.setdefault((trial.operation, trial.backend, trial.failure), [])
            at_once.append(f"{trial.dtype} {trial.head_dim}")
    failures = [
        _failure_line(operation, backend, f"{reason}; tried: {', '.join(kinds)}")
        for (operation, backend, reason), kinds in failed.items()
    ]
    return _verdict_lines(verdicts.verdicts) + failures


def outcome_lines(operation: str, backend: str, verdicts: Iterable[Verdict], reason: str | None) -> list[str]:
    """Returns the lines on one backend's trial; `reason`: why it came to no verdicts."""
    return _verdict_lines(verdicts) if reason is None else [_failure_line(operation, backend, reason)]


def _verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    by_kind = groupby(verdicts, key=lambda of: (of.operation, of.backend, of.dtype, of.head_dim))
    return [
        f"{operation:<20} {backend:<11} {dtype:<9} {head_dim:>4}  {_finding(list(of_kind))}"
        for (operation, backend, dtype, head_dim), of_kind in by_kind
    ]


def _finding(of_kind: Sequence[Verdict]) -> str:
    problems = list(dict.fromkeys(verdict.problem for verdict in of_kind if verdict.problem))
    error = next((verdict.error for verdict in of_kind if verdict.error is not None), None)
    parts = [] if error is None else [f"error {error:4.2f} of what rounding allows"]
    for verdict in of_kind:
        if verdict.speedup is not None and verdict.seconds is not None:
            use = "" if verdict.is_chosen else ", not used"
            parts.append(f"{verdict.shapes} {verdict.speedup:.2f}x ({1e3 * verdict.seconds:.3g} ms{use})")
    return "; ".join([*parts, *(f"not used: {problem}" for problem in problems)])


def _failure_line(operation: str, backend: str, reason: str) -> str:
    return f"{operation:<20} {backend:<11} not used: {reason}"
