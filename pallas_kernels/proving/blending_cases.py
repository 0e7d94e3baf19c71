"""What a backend of `blend_kv` is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blending import api
from pallas_kernels.dispatch import UnsupportedReasons, current_target
from pallas_kernels.proving.case import ROUNDING, Case, Operation, Timing, Wanted, numbers

# By program: keys, fresh rows, KV heads.
SIZES = {"scattered": (4097, 300, 2), "all": (1000, 1000, 4), "few keys": (100, 37, 1), "one row": (513, 1, 2)}
TIMED_KEYS, TIMED_ROWS = 8192, {"full": 8192, "scattered": 1293, "few": 64, "one": 1}
TIMED_LAYERS, TIMED_KV_HEADS = 2, 8


def blend(*arrays: Any, implementation: str) -> tuple[Any, ...]:
    """Blends a layer by itself, and as one of a stack, whose other layers are to stay as they are."""
    alone = _blend(*arrays, implementation=implementation)
    k, v, *others = arrays
    stacks = (jnp.stack([x, x, x]) for x in (k, v))
    return *alone, *_blend(*stacks, *others, layer=1, implementation=implementation)


def _blend(k: Any, v: Any, k_fresh: Any, v_fresh: Any, indices: Any, cos: Any, sin: Any, **options: Any) -> Any:
    return api.blend_kv(k, v, k_fresh, v_fresh, indices, cos=cos, sin=sin, **options)


def blend_layers(*arrays: Any, implementation: str) -> tuple[Any, ...]:
    """Blends the layers of a stack in place, as a prefill does, in arrays of the program's own."""
    k, v, k_fresh, v_fresh, *others = arrays

    def blend_layer(stacks: tuple[Any, Any], layer: Any) -> tuple[tuple[Any, Any], None]:
        return _blend(
            *stacks, k_fresh[layer], v_fresh[layer], *others, layer=layer, implementation=implementation
        ), None

    stacks, layers = (k, v), range(k.shape[0])
    if current_target().platform == "tpu":  # where layers are scanned; on a GPU they are written out
        return jax.lax.scan(blend_layer, stacks, jnp.arange(layers.stop))[0]
    for layer in layers:
        stacks, _ = blend_layer(stacks, layer)
    return stacks


def cases(dtype: str, head_dim: int) -> list[Case]:
    """Returns the cases of a dtype and a head_dim; some of the fresh rows are padding, and NaN."""
    found = []
    for name, (keys, rows, kv_heads) in SIZES.items():
        rng = np.random.default_rng(head_dim + keys)
        arrays = _arrays(rng, dtype, keys, rows, kv_heads, head_dim)
        padding = rows // 4 if rows < keys else 0
        fresh, indices = arrays[2:4], arrays[4]
        if padding:
            indices[-padding:] = keys + np.arange(padding)
            for array in fresh:
                array[-padding:] = np.nan
        found.append(Case(name, name, blend, arrays, partial(_wanted, arrays, padding, dtype)))
    return found


def _arrays(
    rng: np.random.Generator, dtype: str, keys: int, rows: int, kv_heads: int, head_dim: int, *stack: int
) -> tuple[np.ndarray, ...]:
    kv = [numbers(rng, dtype, *stack, tokens, kv_heads, head_dim) for tokens in (keys, keys, rows, rows)]
    angles = rng.uniform(0, 1000, (keys, head_dim // 2))
    indices = np.sort(rng.choice(keys, rows, replace=False)).astype(np.int32)
    return *kv, indices, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _wanted(arrays: tuple[np.ndarray, ...], padding: int, dtype: str) -> list[Wanted]:
    k, v, k_fresh, v_fresh, indices, cos, sin = (x if x.dtype == np.int32 else x.astype(np.float64) for x in arrays)
    real = slice(0, indices.size - padding)
    k_before, v_before, at = k.copy(), v.copy(), indices[real]
    k[at], v[at] = k_fresh[real], v_fresh[real]
    first, second = np.split(k, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    allowed = 1.25 * ROUNDING[dtype] * np.abs(rotated) + 4e-6
    unchanged = np.zeros_like(allowed)
    return [
        Wanted(rotated, allowed),
        Wanted(v, 0.0),
        Wanted(np.stack([k_before, rotated, k_before]), np.stack([unchanged, allowed, unchanged])),
        Wanted(np.stack([v_before, v, v_before]), 0.0),
    ]


def timings(dtype: str, head_dim: int) -> list[Timing]:
    """Returns the calls to be timed."""
    found = []
    for shapes, rows in TIMED_ROWS.items():
        rng = np.random.default_rng(0)
        arrays = _arrays(rng, dtype, TIMED_KEYS, rows, TIMED_KV_HEADS, head_dim, TIMED_LAYERS)
        found.append(Timing(shapes, blend_layers, arrays, partial(_as_xla, dtype)))
    return found


def _as_xla(dtype: str, results: Sequence[np.ndarray]) -> list[Wanted]:
    k, v = (np.asarray(result).astype(np.float32) for result in results)
    return [Wanted(k, 2.5 * ROUNDING[dtype] * np.abs(k) + 4e-6), Wanted(v, 0.0)]


def unsupported(dtype: str, head_dim: int) -> UnsupportedReasons:
    """Returns why backends can't serve a dtype and a head_dim, with the KV heads of the calls that are timed."""
    array: Any = jax.ShapeDtypeStruct((8, TIMED_KV_HEADS, head_dim), jnp.dtype(dtype))
    return api.unsupported(array, array)


BLENDING = Operation("blend_kv", api.BACKENDS, unsupported, cases, timings)
