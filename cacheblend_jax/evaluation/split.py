"""How a model and its KV are split over devices, as `load_model(mesh=…)` does it: in bytes, without any device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import jax
import jax.numpy as jnp

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.sharding import ways_of
from cacheblend_jax.model.transformer import abstract_params, axis_names


@dataclass(frozen=True)
class Split:
    """What one of several devices holds.

    Attributes:
        weight_bytes: of the weights, on each device.
        layer_weight_bytes: of these, those of one layer.
        kv_ways: into how many parts KV is split; 1 where every device has all of it.
        query_ways: the same of queries.
        itemsize: bytes of a value.
    """

    weight_bytes: int
    layer_weight_bytes: int
    kv_ways: int
    query_ways: int
    itemsize: int


@cache
def split_over(config: ModelConfig, num_devices: int) -> Split:
    """Returns the split of a model over a mesh axis `model` of so many devices, by the rules that hold by default."""
    ways = ways_of({"model": num_devices}, config)

    def num_bytes(leaf: jax.ShapeDtypeStruct, names: jax.P) -> int:
        return leaf.size * leaf.dtype.itemsize // prod(ways.get(name, 1) for name in names)

    sizes = jax.tree.map(num_bytes, abstract_params(config), axis_names(config))
    layers = sum(jax.tree.leaves(sizes.layers))
    return Split(
        weight_bytes=sum(jax.tree.leaves(sizes.embedder)) + layers,
        layer_weight_bytes=layers // config.num_layers,
        kv_ways=ways["kv_heads"],
        query_ways=ways["heads"],
        itemsize=jnp.dtype(config.dtype).itemsize,
    )


def product_ways(config: ModelConfig, num_devices: int) -> float:
    """Returns into how many parts a layer's products are split: fewer than devices where its sizes do not divide."""
    whole, split = split_over(config, 1), split_over(config, num_devices)
    return whole.layer_weight_bytes / split.layer_weight_bytes
