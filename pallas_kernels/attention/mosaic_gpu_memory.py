"""The kernel for NVIDIA Hopper: the shape of a tile, and the shared memory and barriers that its warpgroups share.

Fields named after what they hold are references to arrays in shared memory; Pallas has no public type for them, so they
are `Any`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


class Exponents(NamedTuple):
    """How products of queries and keys become exponents of two, the highest product the highest exponent.

    The exponent is `scale * product`, or with a soft cap `scale * tanh(inner_scale * product)`.
    """

    scale: float  # positive
    inner_scale: float | None = None  # positive


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    computing: int  # warpgroups
    rows: int  # of one of them
    keys: int  # of one block
    stages: int
    head_dim: int
    dtype: jnp.dtype
    exponents: Exponents
    has_starts: bool
    interpret: bool


def scratch(shape: Shape) -> list[Any]:
    """Returns the types of shared memory and barriers that the kernel asks for."""
    # The widest swizzle whose columns divide head_dim: then no head_dim needs padding.
    columns = next(size for size in (64, 32, 16) if shape.head_dim % size == 0)
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))

    def shared(*sizes: int) -> Any:
        return plgpu.SMEM((*sizes, shape.head_dim), shape.dtype, transforms=transforms)

    return [
        shared(shape.computing, shape.rows),
        shared(shape.stages, shape.keys),
        shared(shape.stages, shape.keys),
        plgpu.SMEM((shape.computing, shape.rows), jnp.float32),
        plgpu.Barrier(num_barriers=shape.computing),
        plgpu.Barrier(num_barriers=shape.stages),
        plgpu.Barrier(num_barriers=shape.stages),
        plgpu.Barrier(num_arrivals=shape.computing, num_barriers=shape.stages),
        plgpu.Barrier(num_arrivals=shape.computing, num_barriers=shape.stages),
        plgpu.Barrier(num_arrivals=shape.computing),
        *([plgpu.SMEM((shape.computing, shape.rows, shape.keys), shape.dtype)] if shape.interpret else []),
    ]


class Shared(NamedTuple):
    """Shared memory and barriers, in the order of `scratch`."""

    q: Any
    k: Any
    v: Any
    lse: Any
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    k_read: Any
    v_read: Any
    turn: Any
    weights: Any = None  # in the interpreter only
