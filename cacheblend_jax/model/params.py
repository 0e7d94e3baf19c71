"""A model's parameters, in their two forms: the layers' weights stacked, or each layer's as arrays of their own.

A GPU takes the second form. There, XLA copies a layer's matrix out of a stack before it multiplies by it (0.44 GB a
layer of a Llama 3 8B), or, where the index is a constant, compiles and tunes another product for each layer. Arrays of
their own are read where they lie, and all layers have the same products. Elsewhere a stack makes a prefill one loop,
which compiles in a fraction of the time.

In the second form, matrices that multiply the same rows also stand side by side in one (`JOINED`), for one product
instead of three or two; but not on a mesh, where each device's share of such a matrix would be no share of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Int, Shaped

# The projections that a joined matrix, or bias, holds, as columns in this order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


LEAST_LAYER_BYTES = 1 << 20  # of weights that are worth a program for each layer on a CPU
EXPERTS = "experts"  # the module whose matrices are `[layers, experts, …]`


@struct.dataclass
class OfLayer:
    """One layer's matrices, or biases, in a stack, none of which is copied before it is asked for."""

    stack: Shaped[Array, "layers experts ..."]
    layer: Int[Array, ""] | int

    def at(self, experts: Int[Array, "*chosen"]) -> Shaped[Array, "..."]:
        """Returns those of some experts, or of one: axes of the experts chosen, then its own."""
        return self.stack[self.layer, experts]

    def whole(self) -> Shaped[Array, "experts ..."]:
        """Returns those of all experts."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)


@struct.dataclass
class Params:
    """A model's parameters: plain nested dicts of arrays.

    The leaves of `layers` are stacked, `[layers, …]`, or `by_layer`: tuples of one array a layer. Then projections may
    be `joined`; `separated` shows them as they are stored.
    """

    embedder: dict[str, Any]
    layers: dict[str, Any]

    @property
    def by_layer(self) -> bool:
        """Whether each layer's weights are arrays of their own."""
        return isinstance(jax.tree.leaves(self.layers, is_leaf=is_by_layer)[0], tuple)

    def layer(self, index: Int[Array, ""] | int) -> dict[str, Any]:
        """Returns the weights of layer `index`, which may be traced where they are stacked or there is but one.

        Those of experts, of which a few rows need but a few, are not taken out of their stack: each is an `OfLayer`.
        """

        def of(leaf: Any) -> Any:
            if isinstance(leaf, tuple):
                return leaf[0] if len(leaf) == 1 else leaf[index]
            return lax.dynamic_index_in_dim(leaf, index, keepdims=False)

        def uncopied(leaf: Any) -> OfLayer:
            return OfLayer(of(leaf)[None], 0) if isinstance(leaf, tuple) else OfLayer(leaf, index)

        return {
            name: jax.tree.map(uncopied if name == EXPERTS else of, module, is_leaf=is_by_layer)
            for name, module in self.layers.items()
        }

    def only_layer(self, index: int) -> Params:
        """Returns what a program of one layer takes: a stack whole, else that layer alone, so that it serves all."""
        if not self.by_layer:
            return self
        alone = jax.tree.map(lambda leaf: (leaf[index],), self.layers, is_leaf=is_by_layer)
        return Params(self.embedder, alone)

    @property
    def joined(self) -> bool:
        """Whether projections of the same rows are one matrix."""
        return is_joined(self.layers)

    def take_apart(self, *, joined: bool) -> None:
        """Replaces stacked leaves by tuples, in place and one by one: at no time is more than one held twice.

        Args:
            joined: also joins projections of the same rows, layer by layer.
        """
        _take_apart(self.layers)
        if joined:
            _join_in_place(self.layers)

    def separated(self) -> Params:
        """Returns the parameters with each projection a leaf of its own: joined ones as `Columns`, read when needed."""
        layers = {name: module for name, module in self.layers.items() if name not in JOINED}
        for name in JOINED.keys() & self.layers.keys():
            for part, columns in self._columns_of(name).items():
                joined = self.layers[name].items()
                layers[part] = {kind: tuple(Columns(array, columns) for array in leaf) for kind, leaf in joined}
        return Params(self.embedder, layers)

    def _columns_of(self, name: str) -> dict[str, slice]:
        """Returns where the projections are in a joined one."""
        parts, total = JOINED[name], self.layers[name]["kernel"][0].shape[1]
        # Queries are as many as the output projection takes; all others of a joined matrix are alike.
        first = self.layers["o_proj"]["kernel"][0].shape[0] if name == "qkv_proj" else total // len(parts)
        ends = [first + (total - first) // (len(parts) - 1) * number for number in range(len(parts))]
        return {part: slice(begin, end) for part, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True)}


@dataclass(frozen=True, eq=False)
class Columns:
    """The part of a joined matrix or bias that is one projection's; an array for `numpy`, cut out only then."""

    of: Shaped[Array, "*rows _"]
    columns: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's shape."""
        return *self.of.shape[:-1], self.columns.stop - self.columns.start

    @property
    def dtype(self) -> np.dtype:
        """The matrix's dtype."""
        return self.of.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.of[..., self.columns], dtype)


def join(layers: dict[str, Any], combine: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Returns what there is of each projection with that of projections of the same rows joined, by `combine`."""
    rest = dict(layers)
    for name, parts in JOINED.items():
        if parts[0] not in rest:  # the MLP's, where there are experts
            continue
        modules = [rest.pop(part) for part in parts]
        rest[name] = {kind: combine([module[kind] for module in modules]) for kind in modules[0]}
    return rest


def side_by_side(parts: Sequence[Shaped[Array, "*rows _"]]) -> Shaped[Array, "*rows columns"]:
    """Joins matrices, or biases (traceable)."""
    return jnp.concatenate(parts, axis=-1)


def is_joined(layers: dict[str, Any]) -> bool:
    """Returns whether weights, of one layer or of all, have projections of the same rows in one matrix."""
    return not JOINED.keys().isdisjoint(layers)


def stacked(params: Params) -> Params:
    """Returns parameters whose layers are stacked: `lax.scan` over layers takes no others."""
    if not params.by_layer:
        return params
    return replace(params, layers=jax.tree.map(jnp.stack, params.layers, is_leaf=is_by_layer))


def shared_by_layer(params: Params) -> Params:
    """Returns stacked parameters on a CPU with each layer's as arrays of their own, in the same memory.

    Where a layer of a leaf does not begin at a multiple of 64 bytes, it is copied. Of shapes, returns shapes.
    """

    def of_layers(stack: Any) -> tuple[Any, ...]:
        if isinstance(stack, jax.ShapeDtypeStruct):
            return (jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=stack.sharding),) * stack.shape[0]
        return tuple(jax.device_put(list(np.asarray(stack)), stack.sharding))

    return Params(params.embedder, jax.tree.map(of_layers, params.layers))


def is_by_layer(leaf: Any) -> bool:
    """Returns whether a leaf of `Params` is a tuple of one array a layer (for `is_leaf` of tree functions)."""
    return isinstance(leaf, tuple)


def suits_by_layer(platform: str) -> bool:
    """Returns whether a platform wants each layer's weights in arrays of their own."""
    return platform == "gpu"


def suits_programs_of_layers(platform: str, params: Params) -> bool:
    """Returns whether a program of one layer is to take that layer's weights alone, of stacked ones.

    On a CPU, it would copy them out of the stack. For small ones that costs less than calling a program.
    """
    if platform != "cpu" or params.by_layer:
        return False
    layer_bytes = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(params.layers))
    return layer_bytes >= LEAST_LAYER_BYTES


def _take_apart(tree: dict[str, Any]) -> None:
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            _take_apart(leaf)
        elif not is_by_layer(leaf):
            tree[name] = tuple(lax.dynamic_index_in_dim(leaf, i, keepdims=False) for i in range(leaf.shape[0]))
            jax.block_until_ready(tree[name])


def _join_in_place(layers: dict[str, Any]) -> None:
    for name, parts in JOINED.items():
        if name not in layers and parts[0] in layers:
            modules = [layers.pop(part) for part in parts]
            layers[name] = {
                kind: _join_layers([list(module.pop(kind)) for module in modules]) for kind in [*modules[0]]
            }


def _join_layers(parts: list[list[jax.Array]]) -> tuple[jax.Array, ...]:
    """Joins each layer's arrays, and lets go of them before the next layer's."""
    made = []
    while parts[0]:
        made.append(side_by_side([part.pop(0) for part in parts]))
        jax.block_until_ready(made[-1])
    return tuple(made)
