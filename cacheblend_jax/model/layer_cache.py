"""One answer's cache as arrays of each layer's own, in the order in which a CPU multiplies them without a copy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from cacheblend_jax.model.kv_cache import GrowingCache, InSequence, KVCache, LayerKV, as_floats, as_kept
from pallas_kernels.indexing import with_block


@struct.dataclass
class LayerCache(InSequence):
    """One layer's keys, rotated, and values of an answer, that rows are written into in place.

    As in a `GrowingCache`, a CPU keeps 16-bit floats as integers of the same bits.

    Attributes:
        dtype: of the floats.
    """

    k: Shaped[Array, "kv_heads head_dim keys"]
    v: Shaped[Array, "kv_heads keys head_dim"]
    dtype: str = struct.field(pytree_node=False)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def layer(self, index: Int[Array, ""] | int) -> LayerKV:
        """Returns the layer's KV, whatever its index."""
        k, v = (as_floats(x, self.dtype) for x in (self.k, self.v))
        return LayerKV(k.transpose(2, 0, 1), v.transpose(1, 0, 2))

    def with_rows(self, index: Int[Array, ""] | int, positions: Int[Array, " rows"], rows: LayerKV) -> LayerCache:
        """Returns it with the rows at these positions, which follow each other, replaced; there must be room."""
        at, zero = jnp.asarray(positions[0], jnp.int32), jnp.int32(0)
        k = with_block(self.k, as_kept(rows.k).transpose(1, 2, 0), (zero, zero, at))
        v = with_block(self.v, as_kept(rows.v).transpose(1, 0, 2), (zero, at, zero))
        return LayerCache(k, v, self.dtype)


@struct.dataclass
class CacheByLayer:
    """All layers' caches of one answer: what decoding by a program for each layer extends."""

    layers: tuple[LayerCache, ...]

    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def k(self) -> jax.Array:
        """The first layer's keys: all of it is where they are, and for as many keys."""
        return self.layers[0].k

    @property
    def is_lost(self) -> bool:
        """Whether a program that was interrupted has taken its buffers."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self))

    def growing(self) -> GrowingCache:
        """Returns it as a cache that several rows can be run over, in one stack (traceable)."""
        k, v = (jnp.stack([getattr(layer, name) for layer in self.layers]) for name in ("k", "v"))
        return GrowingCache(k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3), self.layers[0].dtype)


def layer_with_room(cache: KVCache, index: Int[Array, ""], *, num_keys: int) -> LayerCache:
    """Copies a layer of a cache into one of `num_keys` keys (traceable); padding beyond that many is left out."""
    layer = cache.layer(index)
    more = max(num_keys - layer.k.shape[0], 0)

    def in_order(x: Float[Array, "keys kv_heads head_dim"], *order: int) -> Shaped[Array, "kv_heads _ _"]:
        return jnp.pad(as_kept(x)[:num_keys], ((0, more), (0, 0), (0, 0))).transpose(order)

    return LayerCache(in_order(layer.k, 1, 2, 0), in_order(layer.v, 1, 0, 2), str(cache.k.dtype))
