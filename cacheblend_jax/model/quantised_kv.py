"""Stored KV as a device has it: values, or codes with scales, which become values as they are blended."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import SCALES, KVCache, LayerKV, abstract_cache, cache_shape
from cacheblend_jax.model.params import Params, is_by_layer
from cacheblend_jax.model.transformer import layer_at
from cacheblend_jax.runtime.placing import on_host
from pallas_kernels import QuantisedKV, dequantised
from pallas_kernels.indexing import entry_of

StoredCache = KVCache | QuantisedKV
StoredLayer = LayerKV | QuantisedKV


def stored_layer(cached: StoredCache, index: Int[Array, ""] | int) -> StoredLayer:
    """Returns one layer's stored KV, cut out; `index` may be traced."""
    if isinstance(cached, KVCache):
        return cached.layer(index)
    return jax.tree.map(lambda x: entry_of(x, index), cached)


def layer_values(layer: StoredLayer, key_bias: Float[Array, "kv_heads head_dim"] | None, dtype: jnp.dtype) -> LayerKV:
    """Returns one layer's values."""
    if isinstance(layer, LayerKV):
        return layer
    k = dequantised(layer.k, layer.k_scales, key_bias)
    return LayerKV(k.astype(dtype), dequantised(layer.v, layer.v_scales).astype(dtype))


def cache_values(params: Params, cached: StoredCache, *, config: ModelConfig) -> KVCache:
    """Returns all layers' values (traceable)."""
    if isinstance(cached, KVCache):
        return cached
    dtype, layers = jnp.dtype(config.dtype), []
    for index in range(config.num_layers):
        layers.append(layer_values(stored_layer(cached, index), layer_at(params, config, index).key_bias, dtype))
    return KVCache(*(jnp.stack(each) for each in zip(*((layer.k, layer.v) for layer in layers), strict=True)))


def key_biases(params: Params, config: ModelConfig) -> Float[np.ndarray, "layers kv_heads head_dim"] | None:
    """Returns what the keys of all tokens have in common, on the host; `None` where there is no such thing.

    For `ChunkEntry.k_offset`; on the device, `DecoderLayer.key_bias` is the same.
    """
    if not config.has_key_bias:
        return None
    leaf = params.separated().layers["k_proj"]["bias"]
    biases = np.stack([on_host(bias) for bias in leaf]) if is_by_layer(leaf) else on_host(leaf)
    return biases.reshape(config.num_layers, config.num_kv_heads, config.head_dim)


def abstract_stored(
    config: ModelConfig, num_keys: int, placement: jax.sharding.Sharding, kv_dtype: str | None
) -> StoredCache:
    """As `abstract_cache`, of stored KV: codes of `kv_dtype`, or values."""
    if kv_dtype is None:
        return abstract_cache(config, num_keys, placement)
    shape = cache_shape(config, num_keys)
    codes: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(kv_dtype), sharding=placement)
    scales: Any = jax.ShapeDtypeStruct(shape[:-1], SCALES, sharding=placement)
    return QuantisedKV(codes, codes, scales, scales)
