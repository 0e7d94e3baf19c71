"""How arrays are split over a mesh while a program is traced, and functions that each device runs on its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str | None, ...]  # the names of an array's first axes, those of `Partition.axes`; `None` is never split


@dataclass(frozen=True)
class Partition:
    """Which axes of arrays are split over which axes of a mesh.

    Operations know arrays' axes by these names: `"heads"` (of queries), `"kv_heads"`, `"rows"` (of hidden states). KV
    heads that are not split as far as query heads are, have but one head on each device, which all its queries read.

    Attributes:
        axes: by an array axis's name, the mesh's axes that split it; one that is not named here is not split.
    """

    mesh: jax.sharding.Mesh
    axes: tuple[tuple[str, tuple[str, ...]], ...]

    @cached_property
    def _by_name(self) -> dict[str | None, tuple[str, ...]]:
        return dict(self.axes)

    def over(self, name: str | None) -> tuple[str, ...]:
        """Returns the axes of the mesh that split an axis; none where it is whole on each device."""
        return self._by_name.get(name, ())

    def ways(self, name: str | None) -> int:
        """Returns into how many shares an axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.over(name))

    def spec(self, *names: str | None) -> jax.P:
        """Returns how an array is split whose first axes have these names."""
        split = [self.over(name) for name in names]
        while split and not split[-1]:  # equal splits are to be equal specs
            split.pop()
        return jax.P(*((axes[0] if len(axes) == 1 else axes) if axes else None for axes in split))

    def sharding(self, *names: str | None) -> jax.sharding.NamedSharding:
        """Returns `spec` with the mesh."""
        return jax.sharding.NamedSharding(self.mesh, self.spec(*names))

    def groups(self, name: str) -> list[Partition]:
        """Returns how each group of devices splits its arrays that has one share of an axis, which no other shares."""
        over, mesh = self.over(name), self.mesh
        within = [axis for axis in mesh.axis_names if axis not in over]
        order = [mesh.axis_names.index(axis) for axis in (*over, *within)]
        devices = mesh.devices.transpose(order).reshape(self.ways(name), *(mesh.shape[axis] for axis in within))
        types = (jax.sharding.AxisType.Auto,) * len(within)
        axes = tuple(each for each in self.axes if each[0] != name)
        return [Partition(jax.sharding.Mesh(own, within, axis_types=types), axes) for own in devices]

    def summed(self, x: jax.Array, *names: str) -> jax.Array:
        """Within `by_shares`: sums over the devices that hold different shares of axes of these names."""
        axes = tuple(dict.fromkeys(axis for name in names for axis in self.over(name)))
        return lax.psum(x, axes) if axes else x

    def share(self, name: str) -> Any:
        """Within `by_shares`: returns the number of this device's share of an axis."""
        axes = self.over(name)
        return lax.axis_index(axes) if axes else jnp.int32(0)


_partition: ContextVar[Partition | None] = ContextVar("partition", default=None)


def current_partition() -> Partition | None:
    """Returns how the program that this thread traces splits its arrays; `None` where it does not."""
    return _partition.get()


@contextmanager
def splitting(partition: Partition | None) -> Iterator[None]:
    """In its body, this thread traces programs whose arrays are split so."""
    token = _partition.set(partition)
    try:
        yield
    finally:
        _partition.reset(token)


@contextmanager
def rows_called(name: str | None) -> Iterator[None]:
    """In its body, rows of hidden states are split as the axis of this name is; by default, they are not split."""
    partition = current_partition()
    if partition is None or not partition.over(name):
        yield
        return
    with splitting(Partition(partition.mesh, (*partition.axes, ("rows", partition.over(name))))):
        yield


def by_shares(function: Callable[..., Any], axes: Sequence[Axes], out_axes: Any) -> Callable[..., Any]:
    """Returns a function that each device runs on its shares of the arguments; without a partition, `function`.

    Args:
        axes: the axes' names of each argument, which is an array or a tree of arrays that are split alike.
        out_axes: the same of the result, or a list of them where it is a tuple.
    """
    partition = current_partition()
    if partition is None:
        return function

    def alone(*shares: Any) -> Any:
        with splitting(None):
            return function(*shares)

    several = isinstance(out_axes, list)
    out_specs = tuple(partition.spec(*each) for each in out_axes) if several else partition.spec(*out_axes)
    in_specs = tuple(partition.spec(*each) for each in axes)
    # Kernels say nothing of how their results vary over the mesh, so that it can't be checked.
    return jax.shard_map(alone, mesh=partition.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrained(x: jax.Array, *names: str | None) -> jax.Array:
    """Returns `x`, split as the partition splits axes of these names; without a partition, as it is."""
    partition = current_partition()
    return x if partition is None else lax.with_sharding_constraint(x, partition.sharding(*names))
