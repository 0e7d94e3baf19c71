"""Faults on purpose, as functions that tests call for a few rounds and `scripts/fault_harness.py` for as many as asked.

Each takes a directory of its own, the rounds to go through (any iterable of numbers), and a seed; it returns counts,
and raises `WrongAnswerError` where something was served that must not be.
"""

from __future__ import annotations


class WrongAnswerError(AssertionError):
    """A fault led to a wrong answer, a crash, or damage that stays."""


def require(holds: bool, *what: object) -> None:
    """Raises unless it `holds`."""
    if not holds:
        raise WrongAnswerError(" ".join(map(str, what)))
