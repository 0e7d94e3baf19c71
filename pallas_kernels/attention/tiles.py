"""What every Pallas backend of `selective_attention` shares: query tiles, and the key blocks that each needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

BIG = 2**30
Shaped = jax.Array | jax.ShapeDtypeStruct


class KeyBlocks(NamedTuple):
    """The key blocks that each tile of queries needs: `begin … end`, of them `inner_begin … inner_end` unmasked."""

    begin: jax.Array  # int32 [tiles], as all of them
    inner_begin: jax.Array
    inner_end: jax.Array
    end: jax.Array
    last: jax.Array  # keys from here on are seen by no query of the tile; in keys, not in blocks


class QueryTiles(NamedTuple):
    """Queries as rows of matrix products. The heads that share a KV head are neighbours: a tile spans few positions."""

    rows: jax.Array  # [kv_heads, rows, head_dim]; row = query * group + head of the group
    last_visible: jax.Array  # int32 [rows]; -1 where a row sees nothing
    first_visible: jax.Array  # int32 [rows]
    blocks: KeyBlocks


def make_tiles(
    q: jax.Array,
    positions: jax.Array,
    starts: jax.Array | None,
    kv_length: jax.Array,
    *,
    num_kv_heads: int,
    tile_rows: int,
    block_keys: int,
) -> QueryTiles:
    """Packs `q` `[queries, heads, head_dim]` into tiles of `tile_rows` rows, the last one padded."""
    num_queries, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    padding = -(num_queries * group) % tile_rows
    rows = q.reshape(num_queries, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    rows = jnp.pad(rows.reshape(num_kv_heads, num_queries * group, head_dim), ((0, 0), (0, padding), (0, 0)))
    starts = jnp.zeros_like(positions) if starts is None else starts
    sees_any = (positions < kv_length) & (starts <= positions)
    last = jnp.pad(jnp.repeat(jnp.where(sees_any, positions, -1), group), (0, padding), constant_values=-1)
    first = jnp.pad(jnp.repeat(jnp.maximum(starts, 0), group), (0, padding))
    last, first = last.astype(jnp.int32), first.astype(jnp.int32)
    return QueryTiles(rows, last, first, _key_blocks(last, first, tile_rows, block_keys))


def _key_blocks(last_visible: jax.Array, first_visible: jax.Array, tile_rows: int, block_keys: int) -> KeyBlocks:
    last_visible, first_visible = last_visible.reshape(-1, tile_rows), first_visible.reshape(-1, tile_rows)
    sees_any = last_visible >= 0
    last = last_visible.max(axis=1) + 1
    first = jnp.minimum(jnp.where(sees_any, first_visible, BIG).min(axis=1), last)
    common_last = jnp.where(sees_any, last_visible, BIG).min(axis=1) + 1
    common_first = jnp.where(sees_any, first_visible, 0).max(axis=1)
    begin, end = first // block_keys, -(-last // block_keys)
    inner_begin = jnp.clip(-(-common_first // block_keys), begin, end)
    inner_end = jnp.clip(jnp.minimum(common_last, last) // block_keys, inner_begin, end)
    return KeyBlocks(begin, inner_begin, inner_end, end, last)


def cost(q: Shaped, k: Shaped, *, tile_rows: int, block_keys: int) -> pl.CostEstimate:
    """Returns what attention costs by tiles of such sizes, declared to XLA when positions are not known yet.

    Of queries spread evenly over the keys, each of which sees all keys before it; full prefill and the survivors of a
    blend are such. A tile reads the key and value blocks up to its last query's position.
    """
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    num_rows = num_queries * num_heads // num_kv_heads
    num_tiles = -(-num_rows // tile_rows)
    last_keys = num_keys * np.minimum(np.arange(1, num_tiles + 1) * tile_rows / num_rows, 1.0)
    keys_of_tiles = int(np.ceil(last_keys / block_keys).sum()) * block_keys
    scores = num_kv_heads * tile_rows * keys_of_tiles
    read = num_kv_heads * keys_of_tiles * 2 * head_dim * k.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * head_dim * scores,
        transcendentals=scores,
        bytes_accessed=read + 2 * q.size * q.dtype.itemsize + 4 * num_queries * num_heads,
    )


def unpack_rows(packed: jax.Array, num_queries: int, num_heads: int) -> jax.Array:
    """Undoes the packing: `[kv_heads, rows, …]` becomes `[queries, heads, …]`."""
    num_kv_heads, _, *rest = packed.shape
    group = num_heads // num_kv_heads
    rows = packed[:, : num_queries * group].reshape(num_kv_heads, num_queries, group, *rest)
    return jnp.moveaxis(rows, 0, 1).reshape(num_queries, num_heads, *rest)
