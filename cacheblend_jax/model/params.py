"""A model's parameters, in their two forms: the layers' weights stacked, or each layer's as arrays of their own.

A GPU takes the second form. There, XLA copies a layer's matrix out of a stack before it multiplies by it (0.44 GB a
layer of a Llama 3 8B), or, where the index is a constant, compiles and tunes another product for each layer. Arrays of
their own are read where they lie, and all layers have the same products. Elsewhere a stack makes a prefill one loop,
which compiles in a fraction of the time.

In the second form, matrices that multiply the same rows also stand side by side in one (`JOINED`), for one product
instead of three or two; but not on a mesh, where each device's share of such a matrix would be no share of its parts.
Nor do queries stand with keys and values where few rows have any (`queries_apart`): XLA multiplies by no part of a
matrix, but copies it out first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Shaped

from cacheblend_jax.model.config import ModelConfig
from pallas_kernels.indexing import entry_of

# The projections that a joined matrix, or bias, holds, as columns in this order.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
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
        return entry_of(self.stack, self.layer)


@struct.dataclass
class Params:
    """A model's parameters: plain nested dicts of arrays.

    The leaves of `layers` are stacked, `[layers, …]`, or `by_layer`: tuples of one array a layer. Then projections may
    be `joined`, not in all layers the same: `None` stands where a layer has no such array. `separated` shows them as
    they are stored.
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
            return entry_of(leaf, index)

        def uncopied(leaf: Any) -> OfLayer:
            return OfLayer(of(leaf)[None], 0) if isinstance(leaf, tuple) else OfLayer(leaf, index)

        weights = {
            name: jax.tree.map(uncopied if name == EXPERTS else of, module, is_leaf=is_by_layer)
            for name, module in self.layers.items()
        }
        return _without_absent(weights)

    def only_layer(self, index: int) -> Params:
        """Returns what a program of one layer takes: a stack whole, else that layer alone.

        So it serves all layers, or all whose projections are joined alike.
        """
        if not self.by_layer:
            return self
        alone = jax.tree.map(lambda leaf: (leaf[index],), self.layers, is_leaf=is_by_layer)
        return Params(self.embedder, _without_absent(alone))

    @property
    def joined(self) -> bool:
        """Whether projections of the same rows are one matrix."""
        return bool(joined_in(self.layers))

    def take_apart(self, joined: Sequence[Collection[str]] | None) -> None:
        """Replaces stacked leaves by tuples, in place and one by one: at no time is more than one held twice.

        Args:
            joined: for each layer, which of `JOINED` it is to have; they are made layer by layer. `None`: none has any.
        """
        _take_apart(self.layers)
        if joined is not None:
            _join_in_place(self.layers, joined)

    def separated(self) -> Params:
        """Returns the parameters with each projection a leaf of its own: joined ones as `Columns`, read when needed."""
        layers = {name: module for name, module in self.layers.items() if name not in JOINED}
        for name in JOINED.keys() & self.layers.keys():
            for part, columns in self._columns_of(name).items():
                cut = jax.tree.map(lambda array, columns=columns: Columns(array, columns), self.layers[name])
                layers[part] = _either(layers[part], cut) if part in layers else cut
        return Params(self.embedder, layers)

    def _columns_of(self, name: str) -> dict[str, slice]:
        """Returns where the projections are in a joined one."""
        parts, total = JOINED[name], jax.tree.leaves(self.layers[name]["kernel"])[0].shape[1]
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

    def cut(self) -> jax.Array:
        """Returns the part as an array of its own."""
        return self.of[..., self.columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.cut(), dtype)


def queries_apart(config: ModelConfig) -> frozenset[int]:
    """Returns the layers whose queries stand apart: few rows have queries there, and many more have keys and values.

    They are the model's check layer, and the last one. A request may have another check layer than its model: part of
    that layer's joined matrix is then copied.
    """
    return frozenset((config.check_layer, config.num_layers - 1))


def join(layers: dict[str, Any], modules: Collection[str], combine: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Returns the `modules` made of each projection's: those that are `JOINED` by `combine`."""
    made = {}
    for name in modules:
        parts = [layers[part] for part in JOINED.get(name, (name,))]
        made[name] = {kind: combine([part[kind] for part in parts]) for kind in parts[0]} if parts[1:] else parts[0]
    return made


def as_tuples(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what each layer has in the form `by_layer`: `None` where it lacks a module that others have."""
    absent: dict[str, Any] = {}
    for layer in layers:
        absent |= {name: jax.tree.map(lambda _: None, module) for name, module in layer.items()}
    return jax.tree.map(
        lambda _, *of_layers: of_layers, absent, *(absent | layer for layer in layers), is_leaf=_is_absent
    )


def side_by_side(parts: Sequence[Shaped[Array, "*rows _"]]) -> Shaped[Array, "*rows columns"]:
    """Joins matrices, or biases (traceable)."""
    return jnp.concatenate(parts, axis=-1)


def joined_in(layers: dict[str, Any]) -> frozenset[str]:
    """Returns which of `JOINED` weights have, of one layer or of all."""
    return frozenset(JOINED.keys() & layers.keys())


def stacked(params: Params) -> Params:
    """Returns parameters with stacked layers, each projection by itself: `lax.scan` over layers takes no others."""
    if not params.by_layer:
        return params

    def stack(layers: tuple[Any, ...]) -> jax.Array:
        return jnp.stack([layer.cut() if isinstance(layer, Columns) else layer for layer in layers])

    return replace(params, layers=jax.tree.map(stack, params.separated().layers, is_leaf=is_by_layer))


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
            tree[name] = tuple(entry_of(leaf, i) for i in range(leaf.shape[0]))
            jax.block_until_ready(tree[name])


def _join_in_place(layers: dict[str, Any], joined: Sequence[Collection[str]]) -> None:
    """Joins each layer's arrays, and lets go of them before the next layer's."""
    for name, parts in JOINED.items():
        chosen = [index for index, names in enumerate(joined) if name in names]
        if not chosen or parts[-1] not in layers:  # these were loaded joined
            continue
        modules = [layers.pop(part) for part in parts]
        layers[name] = {}
        for kind in [*modules[0]]:
            rest = [list(module.pop(kind)) for module in modules]
            made: list[jax.Array | None] = [None] * len(joined)
            for index in chosen:
                made[index] = side_by_side([arrays[index] for arrays in rest])
                jax.block_until_ready(made[index])
                for arrays in rest:
                    arrays[index] = None
            layers[name][kind] = tuple(made)
            for module, arrays in zip(modules, rest, strict=True):
                module[kind] = tuple(arrays)
        layers |= _without_absent(dict(zip(parts, modules, strict=True)))


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns leaves by layer that have each layer's array of one or of the other."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=_is_absent)


def _without_absent(layers: dict[str, Any]) -> dict[str, Any]:
    return {name: module for name, module in layers.items() if jax.tree.leaves(module)}


def _is_absent(leaf: Any) -> bool:
    return leaf is None
