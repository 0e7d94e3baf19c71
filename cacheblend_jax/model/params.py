"""A model's parameters, in their two forms: the layers' weights stacked, or each layer's as arrays of their own.

A GPU takes the second form. There, XLA copies a layer's matrix out of a stack before it multiplies by it (0.44 GB a
layer of a Llama 3 8B), or, where the index is a constant, compiles and tunes another product for each layer. Arrays of
their own are read where they lie, and all layers have the same products. Elsewhere a stack makes a prefill one loop,
which compiles in a fraction of the time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Int


@struct.dataclass
class Params:
    """A model's parameters: plain nested dicts of arrays.

    The leaves of `layers` are stacked, `[layers, …]`, or `by_layer`: tuples of one array a layer.
    """

    embedder: dict[str, Any]
    layers: dict[str, Any]

    @property
    def by_layer(self) -> bool:
        """Whether each layer's weights are arrays of their own."""
        return isinstance(jax.tree.leaves(self.layers, is_leaf=is_by_layer)[0], tuple)

    def layer(self, index: Int[Array, ""] | int) -> dict[str, Any]:
        """Returns the weights of layer `index`, which may be traced where they are stacked or there is but one."""

        def of(leaf: Any) -> Any:
            if isinstance(leaf, tuple):
                return leaf[0] if len(leaf) == 1 else leaf[index]
            return lax.dynamic_index_in_dim(leaf, index, keepdims=False)

        return jax.tree.map(of, self.layers, is_leaf=is_by_layer)

    def only_layer(self, index: int) -> Params:
        """Returns what a program of one layer takes: a stack whole, else that layer alone, so that it serves all."""
        if not self.by_layer:
            return self
        alone = jax.tree.map(lambda leaf: (leaf[index],), self.layers, is_leaf=is_by_layer)
        return Params(self.embedder, alone)

    def take_apart(self) -> None:
        """Replaces stacked leaves by tuples, in place and one by one: at no time is more than one held twice."""
        _take_apart(self.layers)


def stacked(params: Params) -> Params:
    """Returns parameters whose layers are stacked: `lax.scan` over layers takes no others."""
    if not params.by_layer:
        return params
    return replace(params, layers=jax.tree.map(jnp.stack, params.layers, is_leaf=is_by_layer))


def is_by_layer(leaf: Any) -> bool:
    """Returns whether a leaf of `Params` is a tuple of one array a layer (for `is_leaf` of tree functions)."""
    return isinstance(leaf, tuple)


def suits_by_layer(platform: str) -> bool:
    """Returns whether a platform wants each layer's weights in arrays of their own."""
    return platform == "gpu"


def _take_apart(tree: dict[str, Any]) -> None:
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            _take_apart(leaf)
        elif not is_by_layer(leaf):
            tree[name] = tuple(lax.dynamic_index_in_dim(leaf, i, keepdims=False) for i in range(leaf.shape[0]))
            jax.block_until_ready(tree[name])
