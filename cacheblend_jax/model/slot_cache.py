"""The cache of many answers decoded together: a slot for each, of equal room, that rows are written into in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from cacheblend_jax.model.config import ModelConfig, ScoreOptions
from cacheblend_jax.model.kv_cache import (
    AttendedLse,
    KVCache,
    LayerInCache,
    LayerKV,
    as_floats,
    as_kept,
    cache_shape,
    keeps_bits,
)
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import block_of, with_block
from pallas_kernels.partition import Axes, Partition, by_shares, current_partition

READS = 8  # lengths that a slot's attention is compiled for where it is not a kernel's: it reads an eighth too much
# Of [layers, slots, keys, kv_heads, head_dim], the order in which a CPU multiplies keys, and values, without a copy.
Order = tuple[int, ...]
CPU_ORDER = ((0, 1, 3, 4, 2), (0, 1, 3, 2, 4))
AS_IT_IS = ((0, 1, 2, 3, 4),) * 2


@struct.dataclass
class SlotCache:
    """All layers' keys, rotated, and values of `slots` answers, each with room for `capacity` tokens.

    Logically `[layers, slots, capacity, kv_heads, head_dim]`; its axes lie in the order that the platform's attention
    reads best. As in a `GrowingCache`, a CPU keeps 16-bit floats as integers of the same bits.

    Attributes:
        orders: of the axes of `k`, and of `v`.
        dtype: of the floats.
    """

    k: Shaped[Array, "layers slots _ _ _"]
    v: Shaped[Array, "layers slots _ _ _"]
    orders: tuple[Order, Order] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    __eq__, __hash__ = object.__eq__, object.__hash__

    @classmethod
    def empty(cls, config: ModelConfig, slots: int, capacity: int) -> SlotCache:
        """Returns a cache of zeros (traceable)."""
        layers, *row = cache_shape(config, capacity)
        shape = (layers, slots, *row)
        dtype = jnp.uint16 if keeps_bits(config.dtype) else jnp.dtype(config.dtype)
        orders = CPU_ORDER if current_target().platform == "cpu" else AS_IT_IS
        k, v = (jnp.zeros([shape[axis] for axis in order], dtype) for order in orders)
        return cls(k, v, orders, config.dtype)

    def rows_axis(self, partition: Partition | None) -> str | None:
        """Returns the name of the axis of slots, and of their rows; `None` where they can't be split evenly."""
        return "slots" if partition is not None and self.k.shape[1] % partition.ways("slots") == 0 else None

    def axes(self, partition: Partition | None) -> tuple[Axes, Axes]:
        """Returns the names of the axes of `k`, and of `v`, as a partition splits them."""
        names = (None, self.rows_axis(partition), None, "kv_heads", None)
        k, v = (tuple(names[axis] for axis in order) for order in self.orders)
        return k, v

    @property
    def capacity(self) -> int:
        """How many tokens a slot has room for."""
        return self.k.shape[self.orders[0].index(2)]

    def lengths(self, positions: Int[Array, " slots"]) -> Int[Array, " slots"]:
        """Returns how many keys of each slot are valid after a row at its position was written."""
        return jnp.minimum(positions + 1, self.capacity)

    def layer(self, index: Int[Array, ""] | int) -> LayerOfSlots:
        """Returns one layer's KV of all slots, where it lies; `index` may be traced."""
        return LayerOfSlots(self, index)

    def with_rows(self, index: Int[Array, ""] | int, positions: Int[Array, " slots"], rows: LayerKV) -> SlotCache:
        """Returns it with one row of each slot replaced, in a layer; positions beyond the capacity write nothing."""

        def written(
            stack: jax.Array,
            order: Order,
            fresh: Shaped[Array, "slots kv_heads head_dim"],
            index: Int[Array, ""] | int,
            positions: Int[Array, " slots"],
        ) -> jax.Array:
            at: list[Any] = [index, jnp.arange(fresh.shape[0]), slice(None), slice(None), slice(None)]
            at[order.index(2)] = positions
            return stack.at[tuple(at)].set(fresh, mode="drop", unique_indices=True, wrap_negative_indices=False)

        slots = self.rows_axis(current_partition())
        return self._written(written, (rows.k, rows.v), (slots, "kv_heads"), (index, positions), ((), (slots,)))

    def with_slot(self, slot: Int[Array, ""], cache: KVCache) -> SlotCache:
        """Returns it with a slot's first rows replaced by a cache's, as many as there is room for."""

        partition = current_partition()
        slots = self.rows_axis(partition)

        def written(
            stack: jax.Array,
            order: Order,
            x: Shaped[Array, "layers keys kv_heads head_dim"],
            slot: Int[Array, ""],
        ) -> jax.Array:
            rows = x[:, None, : self.capacity].transpose(order)
            if partition is None or slots is None:
                return with_block(stack, rows, _place(0, slot))
            at = slot - partition.share(slots) * stack.shape[1]
            place = _place(0, jnp.clip(at, 0, stack.shape[1] - 1))
            there = block_of(stack, place, rows.shape)  # where the slot is another device's
            return with_block(stack, jnp.where(place[1] == at, rows, there), place)

        return self._written(written, (cache.k, cache.v), (None, None, "kv_heads"), (slot,), ((),))

    def _written(
        self,
        write: Callable[..., jax.Array],
        floats: tuple[jax.Array, jax.Array],
        floats_axes: Axes,
        more: tuple[Any, ...],
        more_axes: tuple[Axes, ...],
    ) -> SlotCache:
        fresh = list(map(as_kept, floats))

        def written(stack: jax.Array, order: Order, axes: Axes, x: jax.Array) -> jax.Array:
            def of_share(stack: jax.Array, *arrays: Any) -> jax.Array:
                return write(stack, order, *arrays)

            return by_shares(of_share, [axes, floats_axes, *more_axes], axes)(stack, x, *more)

        axes = self.axes(current_partition())
        k, v = (written(*each) for each in zip((self.k, self.v), self.orders, axes, fresh, strict=True))
        return SlotCache(k, v, self.orders, self.dtype)

    def cut(self, index: Int[Array, ""] | int, slot: Int[Array, ""], num_keys: int) -> LayerKV:
        """Returns a slot's first keys and values in a layer, cut out."""

        def first_keys(stack: jax.Array, order: Order) -> jax.Array:
            sizes = [1, 1, *stack.shape[2:]]
            sizes[order.index(2)] = num_keys
            in_order = block_of(stack, _place(index, slot), sizes)[0, 0]
            rows = in_order.transpose([order.index(axis) - 2 for axis in (2, 3, 4)])
            return as_floats(rows, self.dtype)

        return LayerKV(*map(first_keys, (self.k, self.v), self.orders))


def _place(index: Int[Array, ""] | int, slot: Int[Array, ""]) -> list[jax.Array]:
    return [jnp.asarray(i, jnp.int32) for i in (index, slot, 0, 0, 0)]  # one dtype, whatever jax_enable_x64 is


@struct.dataclass
class LayerOfSlots:
    """One layer's keys and values in a `SlotCache`: one query of each slot attends to its own slot's keys."""

    cache: SlotCache
    index: Int[Array, ""] | int

    __eq__, __hash__ = object.__eq__, object.__hash__

    def attended(
        self,
        q: Float[Array, "slots heads head_dim"],
        positions: Int[Array, " slots"],
        *,
        starts: Int[Array, " slots"] | None,
        kv_length: Int[Array, "*slots"] | int,
        scores: ScoreOptions,
        sinks: Float[Array, " heads"] | None = None,
    ) -> AttendedLse:
        """See `AttendedLayer`. A slot whose position is beyond its capacity yields zeros."""
        rows = self.cache.rows_axis(current_partition())

        def of_share(k: jax.Array, v: jax.Array, index: Int[Array, ""] | int, *arrays: Any) -> AttendedLse:
            layer = LayerOfSlots(SlotCache(k, v, self.cache.orders, self.cache.dtype), index)
            return layer._attended(*arrays, scores=scores)

        lengths = jnp.broadcast_to(jnp.asarray(kv_length), positions.shape)
        axes = [*self.cache.axes(current_partition()), (), (rows, "heads"), (rows,), (rows,), (rows,), ("heads",)]
        attend = by_shares(of_share, axes, [(rows, "heads"), (rows, "heads")])
        return attend(self.cache.k, self.cache.v, self.index, q, positions, starts, lengths, sinks)

    def _attended(
        self,
        q: Float[Array, "slots heads head_dim"],
        positions: Int[Array, " slots"],
        starts: Int[Array, " slots"] | None,
        lengths: Int[Array, " slots"],
        sinks: Float[Array, " heads"] | None,
        *,
        scores: ScoreOptions,
    ) -> AttendedLse:
        first = jnp.zeros_like(positions) if starts is None else starts
        each = (jnp.arange(q.shape[0], dtype=jnp.int32), q[:, None], positions[:, None], first[:, None])
        queries = _Queries(*each, lengths)
        options = {"scores": scores, "sinks": sinks}
        has_starts = starts is not None
        if self.cache.orders == AS_IT_IS:  # on a GPU, a step of a loop costs more than the call of a kernel
            one_by_one = [self._in_place(_Queries(*query), has_starts, options) for query in zip(*queries, strict=True)]
            out, lse = (jnp.stack(x) for x in zip(*one_by_one, strict=True))
        else:
            out, lse = lax.map(lambda query: self._cut_out(query, has_starts, options), queries)
        return out[:, 0], lse[:, 0]

    def _in_place(self, query: _Queries, has_starts: bool, options: dict[str, Any]) -> AttendedLse:
        """Reads a slot where it lies: a kernel stops at its length."""
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (self.cache.k, self.cache.v))
        layer = jnp.asarray(self.index * self.cache.k.shape[1] + query.slot, jnp.int32)
        starts = query.start if has_starts else None
        layer_of_slot = LayerInCache(k, v, layer)
        return layer_of_slot.attended(query.q, query.position, starts=starts, kv_length=query.length, **options)

    def _cut_out(self, query: _Queries, has_starts: bool, options: dict[str, Any]) -> AttendedLse:
        """Cuts about as many of a slot's keys out as are valid, in one of a few sizes; none if the slot is idle."""
        sizes = [-(-self.cache.capacity * part // READS) for part in range(1, READS + 1)]
        starts = query.start if has_starts else None

        def attend(num_keys: int) -> AttendedLse:
            kv = self.cache.cut(self.index, query.slot, num_keys)
            return kv.attended(query.q, query.position, starts=starts, kv_length=query.length, **options)

        def idle() -> AttendedLse:
            return jnp.zeros_like(query.q), jnp.full(query.q.shape[:2], -jnp.inf, jnp.float32)

        smallest = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), query.length)
        branch = jnp.where(query.position[0] < self.cache.capacity, 1 + smallest, 0)
        return lax.switch(branch, [idle, *(partial(attend, size) for size in sizes)])


class _Queries(NamedTuple):
    """One query of each slot; without the leading axis, of one."""

    slot: Int[Array, "*slots"]
    q: Float[Array, "*slots 1 heads head_dim"]
    position: Int[Array, "*slots 1"]
    start: Int[Array, "*slots 1"]
    length: Int[Array, "*slots"]
