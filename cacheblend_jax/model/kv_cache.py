"""The two records of keys and values: one layer's, and all layers' stacked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from cacheblend_jax.model.config import ModelConfig


@struct.dataclass
class LayerKV:
    """One layer's keys and values, each `[keys, kv_heads, head_dim]`."""

    k: Float[Array, "keys kv_heads head_dim"]
    v: Float[Array, "keys kv_heads head_dim"]

    __eq__, __hash__ = object.__eq__, object.__hash__  # comparing arrays as a tuple raises


@struct.dataclass
class LayerInCache:
    """One layer's keys and values as they lie in a cache, whose stacks kernels read, and write, in place.

    Attributes:
        index: the layer, traced or not.
        is_empty: nothing is stored for it yet.
    """

    k: Float[Array, "layers keys kv_heads head_dim"]
    v: Float[Array, "layers keys kv_heads head_dim"]
    index: Int[Array, ""] | int
    is_empty: bool = struct.field(pytree_node=False, default=False)

    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def cache(self) -> KVCache:
        """The cache, with this layer as it is here."""
        return KVCache(self.k, self.v)


@struct.dataclass
class KVCache:
    """All layers' keys and values, each `[layers, keys, kv_heads, head_dim]`.

    What a prefill returns and decoding extends has keys rotated to their positions; what a store keeps has keys before
    RoPE.
    """

    k: Float[Array, "layers keys kv_heads head_dim"]
    v: Float[Array, "layers keys kv_heads head_dim"]

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return f"KVCache(k={_shape_text(self.k)}, v={_shape_text(self.v)})"

    def layer(self, index: Int[Array, ""] | int) -> LayerKV:
        """Returns one layer's KV, cut out; `index` may be traced."""
        return LayerKV(*(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (self.k, self.v)))

    def in_place(self, index: Int[Array, ""] | int, *, is_empty: bool = False) -> LayerInCache:
        """Returns one layer's KV where it lies; `index` may be traced."""
        return LayerInCache(self.k, self.v, index, is_empty)

    def with_layer(self, index: Int[Array, ""] | int, layer: LayerKV) -> KVCache:
        """Returns the cache with one layer's KV replaced, in place if the cache is donated or not needed any more."""
        return KVCache(
            lax.dynamic_update_index_in_dim(self.k, layer.k, index, 0),
            lax.dynamic_update_index_in_dim(self.v, layer.v, index, 0),
        )

    def first(self, num_keys: int) -> KVCache:
        """Returns the first `num_keys` keys and values of each layer."""
        return jax.tree.map(lambda x: x[:, :num_keys], self)

    def with_room(self, num_keys: int) -> KVCache:
        """Returns a copy of `num_keys` keys and values, those of this cache first; the others are zeros."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, num_keys - x.shape[1]), (0, 0), (0, 0))), self)


def _shape_text(leaf: Any) -> str:
    """Returns an array's dtype and shape; JAX also puts other things in an array's place."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)


def cache_shape(config: ModelConfig, num_keys: int) -> tuple[int, int, int, int]:
    """Returns the shape of K, and of V: `[layers, keys, kv_heads, head_dim]`."""
    return config.num_layers, num_keys, config.num_kv_heads, config.head_dim


def abstract_cache(config: ModelConfig, num_keys: int, placement: jax.sharding.Sharding) -> KVCache:
    """Returns a cache of `num_keys` keys as `jax.ShapeDtypeStruct`s with that placement."""
    shape, dtype = cache_shape(config, num_keys), jnp.dtype(config.dtype)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
    empty = jax.eval_shape(lambda: KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return jax.tree.map(lambda _: leaf, empty)
