"""What a backend of `selective_attention` is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import api
from pallas_kernels.dispatch import UnsupportedReasons
from pallas_kernels.proving.case import DTYPES, ROUNDING, TF32, Case, Operation, Timing, Wanted, numbers

LSE_ERROR = 1e-3  # exponents and logarithms are approximations on GPUs
SLACK = 1.5  # over the rounding of the weights before the second product, and of the result after it
SMALLEST = {"bfloat16": 1e-6, "float16": 4e-5, "float32": 1e-6}  # absolute; float16 has no weights below 6e-8
TIMED_KEYS, TIMED_QUERIES = 8192, {"full": 8192, "scattered": 1229, "few": 32, "one": 1}  # 15 % of the keys
# One call with few queries takes less time than its launch. So these are timed as decoding has them: layers of a stack.
TIMED_LAYERS = {"few": 8, "one": 8}


class _Values(NamedTuple):
    """What cases of one program differ in.

    Attributes:
        queries_at: `"all"` keys in order, `"some"` of them, `"tied"` (also several at one), or the `"last"` one.
        magnitude: of the queries: large scores make the maximum matter.
    """

    queries_at: str
    kv_length: int
    magnitude: int = 1


class _Program(NamedTuple):
    """The shapes of a program, and its cases. More blocks of keys than any pipeline has stages, and partial ones."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    values: tuple[_Values, ...]
    has_starts: bool = False
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


PROGRAMS = {
    "full": _Program(1000, 1000, 8, 2, (_Values("all", 1000), _Values("all", 777))),
    "scattered": _Program(
        300, 4097, 4, 2, (_Values("some", 4097), _Values("some", 3001), _Values("tied", 128), _Values("some", 4000, 8))
    ),
    "starts and window": _Program(300, 4097, 4, 2, (_Values("tied", 4000), _Values("some", 4097, 8)), True, 700),
    "one query": _Program(1, 4097, 4, 1, (_Values("last", 4097), _Values("last", 1))),
    # Capped well below the highest scores; in a few places, also of a large query, sinks take most of the weight.
    "soft cap and sinks": _Program(
        37, 1100, 4, 2, (_Values("tied", 1000), _Values("some", 1100, 8)), True, soft_cap=2.5, has_sinks=True
    ),
    "few keys": _Program(37, 100, 7, 1, (_Values("tied", 99), _Values("tied", 100)), True),
}
# Compiling takes seconds a program: float16 differs from bfloat16 in its numbers, not in its tiles and masks.
FLOAT16_PROGRAMS = ("scattered", "starts and window")


def attend(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    starts: Any,
    length: Any,
    sinks: Any,
    *,
    implementation: str,
    layer: int | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Any:
    """Calls the operation with all its options."""
    return api.selective_attention(
        q,
        k,
        v,
        positions,
        layer=layer,
        q_starts=starts,
        kv_length=length,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        return_lse=True,
        implementation=implementation,
    )


def cases(dtype: str, head_dim: int) -> list[Case]:
    """Returns the cases of a dtype and a head_dim; keys and values beyond `kv_length` are NaN."""
    return [
        Case(
            f"{name}, kv_length {values.kv_length}, queries at {values.queries_at} x {values.magnitude}",
            name,
            partial(attend, window=program.window, soft_cap=program.soft_cap),
            _poisoned(_arrays(program, values, head_dim), dtype),
            partial(_wanted, program, values, dtype, head_dim),
        )
        for name, program in PROGRAMS.items()
        for values in program.values
    ]


def _arrays(program: _Program, values: _Values, head_dim: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(head_dim + values.kv_length)
    q = numbers(rng, "float32", program.queries, program.heads, head_dim) * values.magnitude
    k, v = (numbers(rng, "float32", program.keys, program.kv_heads, head_dim) for _ in "kv")
    positions = _positions(program, values, rng)
    starts = rng.integers(0, positions + 2).astype(np.int32) if program.has_starts else None
    sinks = np.linspace(-4, 4, program.heads, dtype=np.float32) if program.has_sinks else None
    return q, k, v, positions, starts, np.int32(values.kv_length), sinks


def _positions(program: _Program, values: _Values, rng: np.random.Generator) -> np.ndarray:
    if values.queries_at == "all":
        positions = np.arange(program.queries)
    elif values.queries_at == "last":
        positions = np.full(program.queries, values.kv_length - 1)
    else:  # some are padding, up to one beyond the last key
        tied = values.queries_at == "tied"
        positions = np.sort(rng.choice(program.keys + 1, program.queries, replace=tied))
    return positions.astype(np.int32)


def _poisoned(arrays: tuple[Any, ...], dtype: str) -> tuple[Any, ...]:
    q, k, v, positions, starts, length, sinks = arrays
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    k[length:] = v[length:] = np.nan
    return q, k, v, positions, starts, length, sinks


def _wanted(program: _Program, values: _Values, dtype: str, head_dim: int) -> list[Wanted]:
    out, absolute, lse = _exact(program, values, head_dim)
    allowed = SLACK * ROUNDING[dtype] * (np.abs(out) + absolute) + SMALLEST[dtype]
    return [Wanted(out, np.where(absolute > 0, allowed, 0.0)), Wanted(lse, LSE_ERROR)]


@cache
def _exact(program: _Program, values: _Values, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns output, the weights' sums of the absolute values, and log-sum-exp, all in float64."""
    q, k, v, positions, starts, length, sinks = _arrays(program, values, head_dim)
    starts = np.zeros_like(positions) if starts is None else starts
    if program.window is not None:
        starts = np.maximum(starts, positions - (program.window - 1))
    key = np.arange(length)[None, :]
    visible = (key >= starts[:, None]) & (key <= positions[:, None]) & (positions < length)[:, None]
    group, results = program.heads // program.kv_heads, []
    for head in range(program.heads):
        keys, head_values = (x[:length, head // group].astype(np.float64) for x in (k, v))
        scores = q[:, head].astype(np.float64) @ keys.T * head_dim**-0.5
        if program.soft_cap is not None:
            scores = program.soft_cap * np.tanh(scores / program.soft_cap)
        scores = np.where(visible, scores, -np.inf)
        highest = np.where(visible.any(axis=1), scores.max(axis=1, initial=-np.inf), 0.0)[:, None]
        weights = np.exp(scores - highest)
        total = weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            total += np.where(total > 0, np.exp(sinks[head] - highest), 0.0)
        with np.errstate(divide="ignore"):
            lse = np.where(total[:, 0] > 0, highest[:, 0] + np.log(total[:, 0]), -np.inf)
        weights /= np.where(total > 0, total, 1.0)
        results.append((weights @ head_values, weights @ np.abs(head_values), lse))
    by_kind = [np.stack(of_heads, axis=1) for of_heads in zip(*results, strict=True)]
    return by_kind[0], by_kind[1], by_kind[2]


def timings(dtype: str, head_dim: int) -> list[Timing]:
    """Returns the calls to be timed, with the heads of Llama 3 8B (half as many of 256 numbers)."""
    heads = 32 if head_dim <= 128 else 16
    rng = np.random.default_rng(0)
    found = []
    for shapes, queries in TIMED_QUERIES.items():
        layers = TIMED_LAYERS.get(shapes)
        keys = (*(() if layers is None else (layers,)), TIMED_KEYS, heads // 4, head_dim)
        # Values above zero: XLA's result itself then says how much rounding may matter.
        k, v = (np.abs(numbers(rng, dtype, *keys)) for _ in "kv")
        positions = np.sort(rng.choice(TIMED_KEYS, queries, replace=False)).astype(np.int32)
        positions[-1] = TIMED_KEYS - 1
        arrays = numbers(rng, dtype, queries, heads, head_dim), k, v, positions, None, np.int32(TIMED_KEYS), None
        found.append(Timing(shapes, attend if layers is None else attend_layers, arrays, partial(_as_xla, dtype)))
    return found


def attend_layers(q: Any, k: Any, v: Any, *others: Any, implementation: str) -> Any:
    """Attends to each layer of a stack."""
    of_layers = [attend(q, k, v, *others, layer=layer, implementation=implementation) for layer in range(k.shape[0])]
    return tuple(jnp.stack(each) for each in zip(*of_layers, strict=True))


def _as_xla(dtype: str, results: Sequence[np.ndarray]) -> list[Wanted]:
    out, lse = (np.asarray(result).astype(np.float32) for result in results)
    rounding = max(ROUNDING[dtype], TF32)
    return [Wanted(out, 4 * SLACK * rounding * np.abs(out) + SMALLEST[dtype]), Wanted(lse, 4 * LSE_ERROR)]


def unsupported(dtype: str, head_dim: int) -> UnsupportedReasons:
    """Returns why backends can't serve a dtype and a head_dim."""
    array: Any = jax.ShapeDtypeStruct((8, 4, head_dim), jnp.dtype(dtype))
    return api.unsupported(array, array)


ATTENTION = Operation("selective_attention", api.BACKENDS, unsupported, cases, timings, FLOAT16_PROGRAMS)
