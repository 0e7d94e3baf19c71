"""Records of keys and values, one layer's and all layers' stacked, and how queries attend to them."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from cacheblend_jax.model.config import ModelConfig, ScoreOptions
from pallas_kernels import QuantisedKV, selective_attention
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import entry_of, with_entry
from pallas_kernels.partition import Partition

SCALES = jnp.dtype(jnp.bfloat16)  # of quantised KV
AttendedLse = tuple[Float[Array, "rows heads head_dim"], Float[Array, "rows heads"]]


@runtime_checkable
class AttendedLayer(Protocol):
    """One layer's rotated keys and values, wherever they lie, as the second half of a layer step takes them."""

    def attended(
        self,
        q: Float[Array, "rows heads head_dim"],
        positions: Int[Array, " rows"],
        *,
        starts: Int[Array, " rows"] | None,
        kv_length: Int[Array, "*of"] | int,
        scores: ScoreOptions,
        sinks: Float[Array, " heads"] | None = None,
    ) -> AttendedLse:
        """Returns `selective_attention` of rotated queries, with the log-sum-exp that it returns."""


class _AttendedWhole:
    """The attention of a record whose `k` and `v` are a layer's, or with an `index` all layers' stacked."""

    k: jax.Array
    v: jax.Array
    index: Int[Array, ""] | int | None

    def attended(
        self,
        q: Float[Array, "rows heads head_dim"],
        positions: Int[Array, " rows"],
        *,
        starts: Int[Array, " rows"] | None,
        kv_length: Int[Array, ""] | int,
        scores: ScoreOptions,
        sinks: Float[Array, " heads"] | None = None,
    ) -> AttendedLse:
        """See `AttendedLayer`."""
        masks: dict[str, Any] = {"q_starts": starts, "kv_length": kv_length, "sinks": sinks}
        out, lse = selective_attention(
            q, self.k, self.v, positions, layer=self.index, return_lse=True, **masks, **scores
        )
        return out, lse


@struct.dataclass
class LayerKV(_AttendedWhole):
    """One layer's keys and values, each `[keys, kv_heads, head_dim]`."""

    k: Float[Array, "keys kv_heads head_dim"]
    v: Float[Array, "keys kv_heads head_dim"]

    index = None  # not a field
    __eq__, __hash__ = object.__eq__, object.__hash__  # comparing arrays as a tuple raises


@struct.dataclass
class LayerInCache(_AttendedWhole):
    """One layer's keys and values as they lie in a cache, whose stacks kernels read, and write, in place.

    Attributes:
        index: the layer, traced or not.
        is_empty: nothing is stored for it yet.
        stored: its stored KV, where that is quantised and so lies elsewhere.
    """

    k: Float[Array, "layers keys kv_heads head_dim"]
    v: Float[Array, "layers keys kv_heads head_dim"]
    index: Int[Array, ""] | int
    is_empty: bool = struct.field(pytree_node=False, default=False)
    stored: QuantisedKV | None = None

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
        return LayerKV(*(entry_of(x, index) for x in (self.k, self.v)))

    def in_place(
        self, index: Int[Array, ""] | int, *, is_empty: bool = False, stored: QuantisedKV | None = None
    ) -> LayerInCache:
        """Returns one layer's KV where it lies, or where it is to lie; `index` may be traced."""
        return LayerInCache(self.k, self.v, index, is_empty, stored)

    def with_layer(self, index: Int[Array, ""] | int, layer: LayerKV) -> KVCache:
        """Returns the cache with one layer's KV replaced, in place if the cache is donated or not needed any more."""
        return KVCache(
            with_entry(self.k, layer.k, index),
            with_entry(self.v, layer.v, index),
        )

    def first(self, num_keys: int) -> KVCache:
        """Returns the first `num_keys` keys and values of each layer."""
        return jax.tree.map(lambda x: x[:, :num_keys], self)

    def growing(self) -> GrowingCache:
        """Returns it as one that grows (traceable)."""
        return GrowingCache.from_cache(self)

    def with_room(self, num_keys: int) -> KVCache:
        """Returns a copy of `num_keys` keys and values, those of this cache first; the others are zeros."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, num_keys - x.shape[1]), (0, 0), (0, 0))), self)


class InSequence:
    """What holds of a cache of one answer, whose rows follow each other."""

    def rows_axis(self, partition: Partition | None) -> str | None:
        """Returns the name of the axis of rows that are run over it: they follow each other, so none splits them."""
        return None

    def lengths(self, positions: Int[Array, " rows"]) -> Int[Array, ""]:
        """Returns how many keys are valid after rows at these positions, which follow each other, were written."""
        return positions[-1] + 1


@struct.dataclass
class GrowingCache(InSequence):
    """A cache that rows are written into one layer after another, in place: decoding's. Keys are rotated.

    On a CPU, XLA writes a row into an array of 16-bit floats by converting the whole array to float32, and all of it
    back. There, such floats are kept as integers of the same bits.

    Attributes:
        dtype: of the floats.
    """

    k: Shaped[Array, "layers keys kv_heads head_dim"]
    v: Shaped[Array, "layers keys kv_heads head_dim"]
    dtype: str = struct.field(pytree_node=False)

    __eq__, __hash__ = object.__eq__, object.__hash__

    @classmethod
    def from_cache(cls, cache: KVCache) -> GrowingCache:
        """Returns the cache as one that grows (traceable)."""
        return cls(as_kept(cache.k), as_kept(cache.v), str(cache.k.dtype))

    @property
    def is_lost(self) -> bool:
        """Whether a program that was interrupted has taken its buffers."""
        return self.k.is_deleted() or self.v.is_deleted()

    def growing(self) -> GrowingCache:
        """Returns itself."""
        return self

    def cache(self) -> KVCache:
        """Returns it as an ordinary cache (traceable)."""
        return KVCache(*(as_floats(x, self.dtype) for x in (self.k, self.v)))

    def layer(self, index: Int[Array, ""] | int) -> LayerKV | LayerInCache:
        """Returns one layer's KV, where it lies if the floats are kept as such; `index` may be traced."""
        if not keeps_bits(self.dtype):
            return LayerInCache(self.k, self.v, index)
        cut = (entry_of(x, index) for x in (self.k, self.v))
        return LayerKV(*(as_floats(x, self.dtype) for x in cut))

    def with_rows(self, index: Int[Array, ""] | int, positions: Int[Array, " rows"], rows: LayerKV) -> GrowingCache:
        """Returns it with a layer's rows at these positions, which follow each other, replaced; there must be room."""
        place = [jnp.asarray(i, jnp.int32) for i in (index, positions[0], 0, 0)]  # one dtype, jax_enable_x64 or not

        def written(stack: jax.Array, fresh: jax.Array) -> jax.Array:
            # Not `with_block`: where no place can count from the end, XLA for TPUs copies all of the cache first.
            return lax.dynamic_update_slice(stack, as_kept(fresh)[None], place)

        return GrowingCache(written(self.k, rows.k), written(self.v, rows.v), self.dtype)


@runtime_checkable
class Growable(Protocol):
    """A cache in any form."""

    def growing(self) -> GrowingCache:
        """Returns it as one that grows (traceable)."""


def with_room(cache: Growable, *, num_keys: int) -> GrowingCache:
    """Copies a cache into one of `num_keys` keys that grows; keys of it beyond that many, its padding, are left out."""
    growing = cache.growing()
    more = max(num_keys - growing.k.shape[1], 0)
    k, v = (jnp.pad(x[:, :num_keys], ((0, 0), (0, more), (0, 0), (0, 0))) for x in (growing.k, growing.v))
    return GrowingCache(k, v, growing.dtype)


def keeps_bits(dtype: Any) -> bool:
    """Whether a cache that rows are written into keeps floats of this dtype as integers of the same bits."""
    return jnp.dtype(dtype).itemsize == 2 and current_target().platform == "cpu"


def as_kept(x: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns floats as such a cache keeps them."""
    return lax.bitcast_convert_type(x, jnp.uint16) if keeps_bits(x.dtype) else x


def as_floats(x: Shaped[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Returns the floats of a dtype that such a cache keeps."""
    return lax.bitcast_convert_type(x, jnp.dtype(dtype)) if keeps_bits(dtype) else x


def _shape_text(leaf: Any) -> str:
    """Returns an array's dtype and shape; JAX also puts other things in an array's place."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)


def cache_shape(config: ModelConfig, num_keys: int) -> tuple[int, int, int, int]:
    """Returns the shape of K, and of V: `[layers, keys, kv_heads, head_dim]`."""
    return config.num_layers, num_keys, config.num_kv_heads, config.head_dim


def layer_bytes(config: ModelConfig, num_keys: int, kv_dtype: str | None = None) -> int:
    """Returns the bytes of one layer's K and V of so many keys, quantised if `kv_dtype` says so."""
    if kv_dtype is None:
        return 2 * math.prod(cache_shape(config, num_keys)[1:]) * jnp.dtype(config.dtype).itemsize
    head_bytes = config.head_dim * jnp.dtype(kv_dtype).itemsize + SCALES.itemsize
    return 2 * num_keys * config.num_kv_heads * head_bytes


def abstract_cache(config: ModelConfig, num_keys: int, placement: jax.sharding.Sharding) -> KVCache:
    """Returns a cache of `num_keys` keys as `jax.ShapeDtypeStruct`s with that placement."""
    shape, dtype = cache_shape(config, num_keys), jnp.dtype(config.dtype)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
    empty = jax.eval_shape(lambda: KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return jax.tree.map(lambda _: leaf, empty)
