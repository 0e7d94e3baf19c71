"""Selective attention in plain XLA: blockwise, memory O(queries x block); runs everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.reference import selective_attention_reference
from pallas_kernels.indexing import part_of
from pallas_kernels.soft_cap import soft_capped

FEW_KEYS = 256  # are attended at once: loops take three times as long to compile and save nothing
MASKED = -1e30  # finite, so that a fully masked row stays free of NaN until zeros overwrite it


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_xla(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Returns output and log-sum-exp for validated arguments; `starts` already takes the window into account.

    Its gradient is the reference's, with the memory that takes: O(queries x keys).
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    if num_queries == 1 or num_keys <= FEW_KEYS:
        return _attend_at_once(q, k, v, q_positions, starts, kv_length, scale, soft_cap)
    tile_size, blocks = block_sizes(num_queries, num_keys)

    with jax.named_scope("selective_attention"):
        group = num_heads // num_kv_heads
        num_tiles = -(-num_queries // tile_size)
        padding = num_tiles * tile_size - num_queries
        tiles = _Tile(
            q=jnp.pad(q, ((0, padding), (0, 0), (0, 0))).reshape(num_tiles, tile_size, num_heads, head_dim),
            positions=jnp.pad(q_positions, (0, padding), constant_values=num_keys).reshape(num_tiles, tile_size),
            starts=None if starts is None else jnp.pad(starts, (0, padding)).reshape(num_tiles, tile_size),
        )
        # One tile reads each key once, in place; several share a copy in the order that their products want.
        stored = _Stored(k, v) if num_tiles == 1 else _Stored(k.transpose(1, 0, 2), v.transpose(1, 0, 2), True)

        def attend_tile(_: None, tile: _Tile) -> tuple[None, tuple[jax.Array, jax.Array]]:
            # Heads that share a KV head become rows of one matrix product: [kv_heads, group * tile, head_dim].
            rows = tile.q.reshape(tile_size, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
            rows = rows.reshape(num_kv_heads, group * tile_size, head_dim)
            out, lse = _attend_tile(tile, rows, stored, kv_length, scale, soft_cap, blocks)
            out = out.reshape(num_kv_heads, group, tile_size, head_dim).transpose(2, 0, 1, 3)
            lse = lse.reshape(num_kv_heads, group, tile_size).transpose(2, 0, 1)
            return None, (out.reshape(tile.q.shape), lse.reshape(tile_size, num_heads))

        _, (out, lse) = lax.scan(attend_tile, None, tiles)
        out = out.reshape(-1, num_heads, head_dim)[:num_queries]
        return out, lse.reshape(-1, num_heads)[:num_queries]


def _attend_at_once(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Returns what `attend_xla` does, without loops: for one query (decoding's), or few keys.

    Their scores take little memory, and the steps of a loop would cost more than their products.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    with jax.named_scope("selective_attention"):
        column = jnp.arange(num_keys, dtype=jnp.int32)
        last = jnp.where(q_positions < kv_length, q_positions, -1)
        visible = column[None] <= last[:, None]
        if starts is not None:
            visible &= column[None] >= starts[:, None]
        seen = visible.any(axis=0)
        # Heads that share a KV head become rows of one matrix product: [kv_heads, group * queries, head_dim].
        rows = q.reshape(num_queries, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        rows = rows.reshape(num_kv_heads, -1, head_dim)
        visible = jnp.tile(visible, (num_heads // num_kv_heads, 1))[None]
        scores = jnp.einsum("hqd,hkd->hqk", rows, k.transpose(1, 0, 2), preferred_element_type=jnp.float32) * scale
        scores = jnp.where(visible, soft_capped(scores, soft_cap), MASKED)
        maximum = scores.max(axis=-1)
        weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0)
        total = weights.sum(axis=-1)
        values = jnp.where(seen[None, :, None], v.transpose(1, 0, 2), 0)
        gathered = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        sees_any = visible.any(axis=-1)
        total = jnp.where(sees_any, total, 1)
        out = jnp.where(sees_any[..., None], gathered / total[..., None], 0).astype(q.dtype)
        lse = jnp.where(sees_any, maximum + jnp.log(total), -jnp.inf)
        by_query = (num_kv_heads, -1, num_queries)
        out = out.reshape(*by_query, head_dim).transpose(2, 0, 1, 3)
        return out.reshape(q.shape), lse.reshape(by_query).transpose(2, 0, 1).reshape(num_queries, num_heads)


def _attend_forward(*arguments: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    *arrays, _, _ = arguments
    return attend_xla(*arguments), tuple(arrays)


def _attend_backward(
    scale: float, soft_cap: float | None, arrays: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    q, k, v, q_positions, starts, kv_length = arrays

    def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        visible = {"q_starts": starts, "kv_length": kv_length}
        out, lse = selective_attention_reference(q, k, v, q_positions, **visible, scale=scale, soft_cap=soft_cap)
        return out, lse.astype(jnp.float32)

    return (*jax.vjp(reference, q, k, v)[1](cotangents), None, None, None)


attend_xla.defvjp(_attend_forward, _attend_backward)


class BlockSizes(NamedTuple):
    """Keys per step: `inner` (a multiple of `edge`) where all the tile's queries see every key, else `edge`."""

    inner: int
    edge: int


def block_sizes(num_queries: int, num_keys: int) -> tuple[int, BlockSizes]:
    """Returns queries per tile and keys per step of the XLA implementation: those that are fastest on a CPU.

    Tiles are equal, so that the last one, whose queries see the most keys, is not mostly padding. Steps are large,
    since every operation of a step has a fixed cost. Scattered queries get smaller tiles: they span several times
    their number in positions, so that few keys are visible to a whole tile.
    """
    dense = num_queries * 2 > num_keys
    tiles = max(round(num_queries / (352 if dense else 224)), 1)
    tile = -(-num_queries // tiles)
    tile = -(-tile // 8) * 8
    edge = min(tile if dense else max(num_keys // (2 * tiles), 512), 768, num_keys)
    return tile, BlockSizes(inner=2 * edge if dense and 2 * edge <= num_keys else edge, edge=edge)


class _Tile(NamedTuple):
    q: Float[Array, "tile heads head_dim"]
    positions: Int[Array, " tile"]
    starts: Int[Array, " tile"] | None


class _Stored(NamedTuple):
    """Keys and values, `[keys, kv_heads, head_dim]` or, if `head_major`, `[kv_heads, keys, head_dim]`."""

    k: Float[Array, "_ _ head_dim"]
    v: Float[Array, "_ _ head_dim"]
    head_major: bool = False

    @property
    def num_keys(self) -> int:
        return self.k.shape[int(self.head_major)]

    def block(
        self, begin: Int[Array, ""], size: int
    ) -> tuple[Float[Array, "kv_heads size head_dim"], Float[Array, "kv_heads size head_dim"]]:
        """Returns `size` keys and values from `begin` on."""
        k, v = (part_of(x, begin, size, axis=int(self.head_major)) for x in (self.k, self.v))
        return (k, v) if self.head_major else (k.transpose(1, 0, 2), v.transpose(1, 0, 2))


class _Softmax(NamedTuple):
    """The online softmax's state of one tile's rows."""

    maximum: Float[Array, "kv_heads rows"]
    total: Float[Array, "kv_heads rows"]
    weighted: Float[Array, "kv_heads rows head_dim"]


def _attend_tile(
    tile: _Tile,
    rows: Float[Array, "kv_heads rows head_dim"],
    stored: _Stored,
    kv_length: Int[Array, ""],
    scale: float,
    soft_cap: float | None,
    blocks: BlockSizes,
) -> tuple[Float[Array, "kv_heads rows head_dim"], Float[Array, "kv_heads rows"]]:
    """Returns output and log-sum-exp of one tile, whose queries are repeated in `rows` for the heads of a group."""
    num_kv_heads, num_rows, head_dim = rows.shape
    group = num_rows // tile.positions.shape[0]
    num_keys = stored.num_keys
    float32_rows = rows.dtype == jnp.float32
    query_rows = rows * scale if float32_rows else rows  # low precision scales the float32 scores instead

    valid = tile.positions < kv_length
    starts = jnp.zeros_like(tile.positions) if tile.starts is None else tile.starts
    # [first, last) is visible to some query of the tile, [common_first, common_last) to all of them.
    big = jnp.int32(2**30)
    last = jnp.max(jnp.where(valid, tile.positions, -1)) + 1
    common_last = jnp.min(jnp.where(valid, tile.positions, big)) + 1
    first = jnp.clip(jnp.min(jnp.where(valid, starts, big)), 0, last)
    common_first = jnp.max(jnp.where(valid, starts, 0))
    row_positions, row_starts, row_valid = (jnp.tile(x, group)[None, :, None] for x in (tile.positions, starts, valid))

    def step(block: int, masked: bool, index: jax.Array, state: _Softmax) -> _Softmax:
        # A block that would reach beyond the array is moved back; keys that an earlier block held are masked.
        begin = jnp.minimum(index * block, num_keys - block)
        key_block, value_block = stored.block(begin, block)
        scores = jnp.einsum("hqd,hkd->hqk", query_rows, key_block, preferred_element_type=jnp.float32)
        if not float32_rows:
            scores = scores * scale
        scores = soft_capped(scores, soft_cap)
        if masked:
            column = begin + jnp.arange(block, dtype=jnp.int32)
            key = column[None, None, :]
            visible = (key >= index * block) & (key >= row_starts[..., 0, None]) & (key <= row_positions)
            scores = jnp.where(visible, scores, MASKED)
            value_block = jnp.where((column < kv_length)[None, :, None], value_block, 0)
        maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
        weights = jnp.exp(scores - maximum[..., None])
        rescale = jnp.exp(state.maximum - maximum)
        gathered = jnp.einsum(
            "hqk,hkd->hqd", weights.astype(value_block.dtype), value_block, preferred_element_type=jnp.float32
        )
        return _Softmax(
            maximum=maximum,
            total=state.total * rescale + weights.sum(axis=-1),
            weighted=state.weighted * rescale[..., None] + gathered,
        )

    def steps(block: int, masked: bool, begin: jax.Array, end: jax.Array, state: _Softmax) -> _Softmax:
        """Runs over the keys `[begin, end)`: multiples of `block`, but for an `end` past the last visible key."""
        return lax.fori_loop(begin // block, -(-end // block), lambda i, s: step(block, masked, i, s), state)

    state = _Softmax(
        maximum=jnp.full((num_kv_heads, num_rows), MASKED, jnp.float32),
        total=jnp.zeros((num_kv_heads, num_rows), jnp.float32),
        weighted=jnp.zeros((num_kv_heads, num_rows, head_dim), jnp.float32),
    )
    inner_begin = -(-common_first // blocks.inner) * blocks.inner
    inner_end = jnp.maximum(jnp.minimum(common_last, last) // blocks.inner * blocks.inner, inner_begin)
    if tile.starts is not None:
        state = steps(blocks.edge, True, first // blocks.edge * blocks.edge, jnp.minimum(inner_begin, last), state)
    state = steps(blocks.inner, False, inner_begin, inner_end, state)
    state = steps(blocks.edge, True, inner_end, last, state)

    sees_any = (row_valid & (row_starts <= row_positions))[..., 0]
    total = jnp.where(sees_any, state.total, 1.0)
    out = jnp.where(sees_any[..., None], state.weighted / total[..., None], 0.0)
    return out.astype(rows.dtype), jnp.where(sees_any, state.maximum + jnp.log(total), -jnp.inf)
