"""Which implementation of an operation serves a call: one rule, and one wording when none can."""

from __future__ import annotations

from typing import Literal

Implementation = Literal["xla", "pallas"]
AVAILABLE: tuple[str, ...] = ("xla",)


def resolve_implementation(implementation: str | None, operation: str) -> str:
    """Returns the implementation that serves `operation`; `None` picks the best one for the platform.

    Raises:
        ValueError: the implementation is unknown, or this version has none of that name.
    """
    if implementation is None:
        return "xla"
    if implementation == "pallas":
        raise ValueError(
            f"{operation}: implementation='pallas' is not in this version; use implementation='xla' or None"
        )
    if implementation not in AVAILABLE:
        raise ValueError(
            f"{operation}: unknown implementation {implementation!r}; expected None (best for the platform), "
            "'xla' or 'pallas'"
        )
    return implementation
