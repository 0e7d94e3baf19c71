"""Arrays onto devices and back where other processes hold some of the devices: no process waits for another's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class OwnPart:
    """The part of an axis, of `size`, that a process has of arrays: what its devices hold."""

    axis: int
    held: range
    size: int


def put(tree: Any, placement: jax.sharding.Sharding, own: OwnPart | None = None) -> Any:
    """Puts arrays on the devices of a placement: as `jax.device_put`, of which each process does its devices' part.

    Where processes share the placement, `jax.device_put` has them compare their arrays, by a program that all must run
    at the same time; here each takes what its devices hold out of its own.

    Args:
        own: the part that the arrays are of those that are to be on the devices; `None`: they are whole.
    """
    if placement.is_fully_addressable:
        return jax.device_put(tree, placement)

    def put_parts(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        shape = list(array.shape)
        if own is not None:
            shape[own.axis] = own.size

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            places = list(index or ())
            if own is not None:
                start, stop, _ = places[own.axis].indices(own.size)
                places[own.axis] = slice(start - own.held.start, stop - own.held.start)
            return array[tuple(places)]

        return jax.make_array_from_callback(tuple(shape), placement, part)

    return jax.tree.map(put_parts, tree)


def placed(tree: Any, placement: jax.sharding.Sharding) -> Any:
    """As `put`, of arrays on devices; nothing is copied where each device already holds what it is to hold."""

    def of(leaf: Any) -> Any:
        if leaf.sharding == placement:
            return leaf
        held, wanted = (_held(each, leaf.shape) for each in (leaf.sharding, placement))
        if not wanted.items() <= held.items():
            return put(leaf, placement)
        shares = {shard.device: shard.data for shard in leaf.addressable_shards}
        return jax.make_array_from_single_device_arrays(leaf.shape, placement, [shares[device] for device in wanted])

    return jax.tree.map(of, tree)


def _held(placement: Any, shape: tuple[int, ...]) -> dict[Any, tuple[tuple[int, int, int], ...]]:
    """Returns the ranges of each axis that each of this process's devices holds."""
    held = placement.addressable_devices_indices_map(shape).items()
    return {device: tuple(map(slice.indices, index, shape)) for device, index in held}


def changed_part(tree: Any, part: Any, change: Callable[[Any], Any]) -> Any:
    """Returns arrays with what some of their devices hold changed; nothing of the others is copied.

    Args:
        part: shapes and placements of the arrays that these devices' shares are by themselves.
        change: takes them, which it may donate, and returns those that stand for them. `tree` is lost.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(part)
    if all(leaf.sharding.device_set == own.sharding.device_set for leaf, own in zip(leaves, wanted, strict=True)):
        return change(tree)
    shares = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
    made = jax.make_array_from_single_device_arrays
    shown = [
        made(own.shape, own.sharding, [held[device] for device in own.sharding.addressable_devices])
        for own, held in zip(wanted, shares, strict=True)
    ]
    after = jax.tree.leaves(change(jax.tree.unflatten(structure, shown)))
    for held, own in zip(shares, after, strict=True):
        held |= {shard.device: shard.data for shard in own.addressable_shards}
    whole = [made(leaf.shape, leaf.sharding, [*held.values()]) for leaf, held in zip(leaves, shares, strict=True)]
    return jax.tree.unflatten(structure, whole)


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
