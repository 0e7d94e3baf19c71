"""What a backend is tried on: cases with their results in float64, and calls to be timed beside XLA."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pallas_kernels.dispatch import UnsupportedReasons
from pallas_kernels.verdicts import Kind

HEAD_DIMS = (64, 80, 96, 128, 256)
# The relative error of rounding to a dtype; in float32, that of sums and exponents of many terms.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-18}
PERIOD = 2**20 - 3  # a prime
TF32 = 2.0**-10  # XLA's products of float32 on GPUs, by default
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
KINDS = tuple(Kind(dtype, head_dim) for dtype in DTYPES for head_dim in HEAD_DIMS)


class Wanted(NamedTuple):
    """A result in float64, and how far from it rounding may lead."""

    value: np.ndarray
    allowed: np.ndarray | float


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments whose results are known.

    Attributes:
        program: cases of the same program differ in values only.
        call: the operation, with its static options; takes `arrays` and `implementation=`, returns a tuple.
        wanted: computes the results.
    """

    name: str
    program: str
    call: Callable[..., tuple[Any, ...]]
    arrays: tuple[Any, ...]
    wanted: Callable[[], Sequence[Wanted]]


@dataclass(frozen=True, eq=False)
class Timing:
    """A call that stands for a class of shapes; see `Case`.

    Attributes:
        wanted: what XLA's results ask of another backend's.
    """

    shapes: str
    call: Callable[..., tuple[Any, ...]]
    arrays: tuple[Any, ...]
    wanted: Callable[[Sequence[np.ndarray]], Sequence[Wanted]]


@dataclass(frozen=True)
class Operation:
    """An operation that has Pallas backends.

    Attributes:
        backends: as in its `api.py`.
        unsupported: why backends can't serve a dtype and a head_dim.
        cases: those of a dtype and a head_dim.
        timings: likewise.
        float16_programs: of the cases, those to be tried for float16 beside bfloat16; `None`: all.
    """

    name: str
    backends: Mapping[str, tuple[str, str]]
    unsupported: Callable[[str, int], UnsupportedReasons]
    cases: Callable[[str, int], Sequence[Case]]
    timings: Callable[[str, int], Sequence[Timing]]
    float16_programs: Collection[str] | None = None


def error_share(got: Sequence[Any], wanted: Sequence[Wanted]) -> float:
    """Returns the largest error, as a share of what is allowed; infinite for NaN, and where infinities differ."""
    worst = 0.0
    for result, (value, allowed) in zip(got, wanted, strict=True):
        result = np.asarray(result).astype(np.float64)
        if not value.size:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.where(result == value, 0.0, np.abs(result - value))
            share = np.where(error == 0.0, 0.0, error / allowed)
        worst = max(worst, float(np.nan_to_num(share, nan=np.inf, posinf=np.inf).max()))
    return worst


def numbers(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Draws numbers in [-2, 2] that every dtype holds exactly: cases of all dtypes have the same results.

    Large arrays repeat them, since drawing takes seconds; no row is that of another head or key.
    """
    drawn = rng.integers(-64, 65, min(math.prod(shape), PERIOD), np.int8).astype(np.float32) / 32
    return np.resize(drawn.astype(DTYPES[dtype]), shape)
