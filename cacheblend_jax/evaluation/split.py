"""How a model and its KV are split over devices, as `load_model(mesh=…)` does it: in bytes, without any device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import jax
import jax.numpy as jnp

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import abstract_params, partition_specs
from cacheblend_jax.model.weights import weight_sharding


@dataclass(frozen=True)
class Split:
    """What one of several devices holds.

    Attributes:
        num_devices: over which heads and the MLP are split.
        weight_bytes: of the weights, on each device.
        layer_weight_bytes: of these, those of one layer.
        logits_weight_bytes: of these, those of the projection to logits, where it is not the embedding itself.
        kv_ways: into how many parts KV is split; 1 where every device has all of it.
        itemsize: bytes of a value.
    """

    num_devices: int
    weight_bytes: int
    layer_weight_bytes: int
    logits_weight_bytes: int
    kv_ways: int
    itemsize: int


@cache
def split_over(config: ModelConfig, num_devices: int) -> Split:
    """Returns the split of a model over a mesh axis `model` of so many devices; KV is whole on each of them."""
    mesh = jax.sharding.AbstractMesh((num_devices,), ("model",))

    def num_bytes(leaf: jax.ShapeDtypeStruct, spec: jax.P) -> int:
        sharding = weight_sharding(mesh, spec, leaf.shape)
        assert sharding is not None  # there is a mesh
        return prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    sizes = jax.tree.map(num_bytes, abstract_params(config), partition_specs(config))
    embedder, layers = sum(jax.tree.leaves(sizes.embedder)), sum(jax.tree.leaves(sizes.layers))
    logits = sizes.embedder.get("lm_head", {})
    return Split(
        num_devices=num_devices,
        weight_bytes=embedder + layers,
        layer_weight_bytes=layers // config.num_layers,
        logits_weight_bytes=sum(jax.tree.leaves(logits)),
        kv_ways=1,
        itemsize=jnp.dtype(config.dtype).itemsize,
    )
