"""Arrays onto devices and back where other processes hold some of the devices: no process waits for another's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def put(tree: Any, placement: jax.sharding.Sharding) -> Any:
    """Puts arrays on the devices of a placement: as `jax.device_put`, of which each process does its devices' part.

    Where processes share the placement, `jax.device_put` has them compare their arrays, by a program that all must run
    at the same time; here each takes what its devices hold out of its own, which may be filled no further than that.
    """
    if placement.is_fully_addressable:
        return jax.device_put(tree, placement)

    def put_parts(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])

    return jax.tree.map(put_parts, tree)


def own_range(placement: Any, shape: Sequence[int], axis: int) -> range:
    """Returns the range of an axis that this process's devices hold of an array of this shape."""
    held = [index[axis].indices(shape[axis]) for index in placement.addressable_devices_indices_map(shape).values()]
    return range(min(start for start, _, _ in held), max(stop for _, stop, _ in held))


def on_host(array: Any) -> np.ndarray:
    """Returns an array's values; where other processes hold some of them, by a program that all run."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
