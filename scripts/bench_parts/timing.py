"""How the parts of `gpu_bench.py` time functions, and the rows that they report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.proving.trial import first_line, seconds_by_round

Row = dict[str, Any]


def timed(runs: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, Row]:
    """Median, fastest and slowest round of each, in turn, in milliseconds; `calls`: how often a run does its work."""
    found = seconds_by_round(list(runs.values()), rounds)
    milliseconds = [[1e3 * seconds / calls for seconds in of] for of in found]
    return {
        name: {"ms": statistics.median(of), "ms_fastest": min(of), "ms_slowest": max(of)}
        for name, of in zip(runs, milliseconds, strict=True)
    }


def measured(
    functions: Mapping[str, Callable[..., Any]], arguments: tuple, rounds: int, calls: int = 1
) -> dict[str, Row]:
    """Compiles functions and times them, with the temporary memory that the compiler counts."""
    compiled, rows = {}, {}
    for name, function in functions.items():
        try:
            compiled[name] = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(compiled[name](*arguments))
        except Exception as error:  # a rival that this device lacks must not end the run
            compiled.pop(name, None)
            rows[name] = {"error": first_line(error)}
    times = timed({name: lambda run=run: run(*arguments) for name, run in compiled.items()}, rounds, calls)
    for name, run in compiled.items():
        rows[name] = times[name] | {"temporary_mb": run.memory_analysis().temp_size_in_bytes / 1e6}
    return rows


def row(name: str, found: Row, predicted: float | None, **amounts: float) -> Row:
    """A row whose `amounts` (of a millisecond's work) become rates."""
    rates = {key: amount / found["ms"] for key, amount in amounts.items()} if "ms" in found else {}
    return {"name": name, "predicted_ms": predicted and 1e3 * predicted} | found | rates
