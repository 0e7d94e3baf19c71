"""Tries one backend of one operation on the device of this process: the work of a child process of `prove`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.proving.case import Case, Operation, Timing, error_share
from pallas_kernels.verdicts import SHAPES, Kind, Verdict

REPEATS = 20
ROUNDS, ROUND_SECONDS, MOST_CALLS = 5, 0.02, 50
MOST_COMPARED = 2**22  # numbers of a result
# The same bytes and the same products: not worth half a minute more of everyone's first start.
TIMED_AS = {"float16": "bfloat16"}
Programs = dict[Any, "Future[Any]"]


def try_backend(
    operation: Operation,
    backend: str,
    kinds: Sequence[Kind],
    say: Callable[[str], None] = lambda doing: None,
) -> list[Verdict]:
    """Returns the verdicts on all that the backend serves, of these kinds of calls.

    Programs are compiled beside each other, and timed once nothing else runs.

    Args:
        say: called with what is being done, before it is done: what a crash or a hang is to be blamed on.
    """
    served = [kind for kind in kinds if operation.unsupported(*kind)[backend]() is None]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        errors = dict(_errors(operation, backend, served, pool, say))
        right = [of for of in served if isinstance(errors[of], float)]
        seconds = dict(_seconds(operation, backend, right, pool, say))
    verdicts = []
    for dtype, head_dim in served:
        error = errors[Kind(dtype, head_dim)]
        timed = seconds.get(Kind(TIMED_AS.get(dtype, dtype), head_dim), {})
        for shapes in SHAPES:
            verdict = partial(Verdict, operation.name, backend, dtype, head_dim, shapes)
            if isinstance(error, str):
                verdicts.append(verdict(problem=error))
            elif isinstance(of_shapes := timed.get(shapes, "was not timed"), str):
                verdicts.append(verdict(error=error, problem=of_shapes))
            else:
                verdicts.append(verdict(error, *of_shapes))
    return verdicts


def _errors(
    operation: Operation,
    backend: str,
    served: Sequence[Kind],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> Iterator[tuple[Kind, float | str]]:
    """Yields each dtype's and head_dim's largest error, or what is wrong."""
    prepared = []
    for of in served:
        cases = _cases(operation, of, served)
        programs: Programs = {}
        for case in cases:
            if case.program not in programs:
                programs[case.program] = pool.submit(compiled, case.call, shapes_of(case), backend)
        prepared.append((of, [(case, programs[case.program], pool.submit(case.wanted)) for case in cases]))
    while prepared:
        of, ready = prepared.pop(0)
        yield of, _error_of(of, ready, say)


def _cases(operation: Operation, of: Kind, served: Sequence[Kind]) -> list[Case]:
    cases, fewer = list(operation.cases(*of)), operation.float16_programs
    if fewer is not None and of.dtype == "float16" and Kind("bfloat16", of.head_dim) in served:
        return [case for case in cases if case.program in fewer]
    return cases


def _error_of(
    of: Kind, ready: Sequence[tuple[Case, Future[Any], Future[Any]]], say: Callable[[str], None]
) -> float | str:
    worst = 0.0
    for case, program, wanted in ready:
        label = f"{of[0]}, head_dim {of[1]}, {case.name}"
        say(label)
        try:
            arrays = jax.device_put(case.arrays)
            first = [np.asarray(x) for x in program.result()(*arrays)]
            share = error_share(first, wanted.result())
            if share > 1:
                return f"is wrong by {share:.3g} times what rounding explains ({label})"
            for _ in range(REPEATS):
                if any(
                    a.tobytes() != np.asarray(b).tobytes()
                    for a, b in zip(first, program.result()(*arrays), strict=True)
                ):
                    return f"is not the same every time ({label})"
        except Exception as error:
            return f"fails: {first_line(error)} ({label})"
        worst = max(worst, share)
    return worst


def shapes_of(case: Case | Timing) -> tuple[Any, ...]:
    """Returns the shapes of a call's arrays: what waits to be compiled must not hold the arrays themselves."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.arrays)


def compiled(call: Callable[..., Any], shapes: tuple[Any, ...], implementation: str) -> Any:
    """Returns the program of a call."""
    return jax.jit(partial(call, implementation=implementation)).lower(*shapes).compile()


def _seconds(
    operation: Operation,
    backend: str,
    right: Sequence[Kind],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> Iterator[tuple[Kind, dict[str, tuple[float, float] | str]]]:
    """Yields, by class of shapes, the backend's seconds and XLA's, or what is wrong."""
    timed = dict.fromkeys(Kind(TIMED_AS.get(dtype, dtype), head_dim) for dtype, head_dim in right)
    compiling = {}
    say("compiling what is timed")
    for of in timed:
        for timing in operation.timings(*of):
            for name in (backend, "xla"):
                compiling[of, timing.shapes, name] = pool.submit(compiled, timing.call, shapes_of(timing), name)
    for program in compiling.values():
        program.exception()  # nothing else runs while the first is timed
    for of in timed:
        found: dict[str, tuple[float, float] | str] = {}
        for timing in operation.timings(*of):
            label = f"{of[0]}, head_dim {of[1]}, {timing.shapes}, timed"
            say(label)
            try:
                programs = [compiling[of, timing.shapes, name].result() for name in (backend, "xla")]
                found[timing.shapes] = _time_both(timing, *programs)
            except Exception as error:
                found[timing.shapes] = f"fails: {first_line(error)} ({label})"
        yield of, found


def _time_both(timing: Timing, program: Any, xla: Any) -> tuple[float, float] | str:
    """Returns the backend's seconds and XLA's, or why its results are not XLA's, the same every time."""
    arrays = jax.device_put(timing.arrays)
    first = program(*arrays)
    share = error_share(_sample(first), timing.wanted(_sample(xla(*arrays))))
    if share > 1:
        return f"differs from XLA by {share:.3g} times what rounding explains ({timing.shapes} of many keys)"
    if not all(bool(_same(first, program(*arrays))) for _ in range(REPEATS)):
        return f"is not the same every time ({timing.shapes} of many keys)"
    seconds, xla_seconds = interleaved([lambda: program(*arrays), lambda: xla(*arrays)])
    return seconds, xla_seconds


def _sample(results: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns some rows of large results: float64 of all would take seconds, and gigabytes."""
    rows = [np.asarray(x).reshape(-1, x.shape[-1]) for x in results]
    return [x[:: max(x.size // MOST_COMPARED, 1) | 1] for x in rows]  # an odd step meets all heads


@jax.jit
def _same(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.array_equal(x, y) for x, y in zip(a, b, strict=True)]).all()


def interleaved(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns each call's median seconds."""
    return [statistics.median(seconds) for seconds in seconds_by_round(calls)]


def seconds_by_round(calls: Sequence[Callable[[], Any]], num_rounds: int = ROUNDS) -> list[list[float]]:
    """Returns each call's seconds in each round, in which they take turns.

    Short ones run many times in a row, since a launch takes its own time.
    """
    counts: list[int] = []
    rounds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        took = max(time.perf_counter() - began, 1e-9)
        counts.append(int(min(max(ROUND_SECONDS / took, 1), MOST_CALLS)))
    for _ in range(num_rounds):
        for call, count, seconds in zip(calls, counts, rounds, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                result = call()
            jax.block_until_ready(result)
            seconds.append((time.perf_counter() - began) / count)
    return rounds


def first_line(error: Exception) -> str:
    """Returns an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
