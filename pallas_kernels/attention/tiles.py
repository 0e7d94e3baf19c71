"""What the Pallas backends of `selective_attention` share: query tiles, and the key blocks that each needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

BIG = 2**30  # beyond every position
KEYS_OF_A_SPLIT = 512  # at least


class KeyBlocks(NamedTuple):
    """The key blocks that each tile needs, `[begin, end)`; those in `[inner_begin, inner_end)` need no mask."""

    begin: Int[Array, " tiles"]
    inner_begin: Int[Array, " tiles"]
    inner_end: Int[Array, " tiles"]
    end: Int[Array, " tiles"]
    last: Int[Array, " tiles"]  # no query of the tile sees this key or a later one; counts keys, not blocks

    def part(self, split: Int[Array, ""], num_splits: int) -> KeyBlocks:
        """Returns the blocks of one of `num_splits` ranges of equal size, for the blocks of a single tile."""
        if num_splits == 1:
            return self
        count = self.end - self.begin
        begin = self.begin + lax.div(count * split, jnp.int32(num_splits))
        end = self.begin + lax.div(count * (split + 1), jnp.int32(num_splits))
        inner_begin = jnp.clip(self.inner_begin, begin, end)
        return KeyBlocks(begin, inner_begin, jnp.clip(self.inner_end, begin, end), end, self.last)


class QueryTiles(NamedTuple):
    """Queries as rows of matrix products. Heads that share a KV head are adjacent rows: a tile spans few positions."""

    rows: Float[Array, "kv_heads rows head_dim"]  # row = query * group + head of the group
    last_visible: Int[Array, " rows"]  # -1 where a row sees nothing
    first_visible: Int[Array, " rows"]
    blocks: KeyBlocks

    def row_bounds(self, *, has_starts: bool) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
        """Returns each row's first and last visible key, for kernels that read the first only where it `has_starts`.

        Elsewhere any array takes its place: to fill one with zeros would take a kernel of its own.
        """
        return self.first_visible if has_starts else self.last_visible, self.last_visible


class Grid(NamedTuple):
    """The blocks of a kernel's grid: one for each tile, range of the tile's keys, and KV head."""

    num_tiles: int
    num_splits: int  # ranges of keys
    num_kv_heads: int

    @property
    def size(self) -> int:
        """The number of blocks."""
        return self.num_tiles * self.num_splits * self.num_kv_heads

    def place(self, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Returns tile, split and KV head of the block that starts as number `block`.

        The last tiles see the most keys: they start first, over all heads, and short ones fill the gaps at the end.
        """
        kv_heads, splits = jnp.int32(self.num_kv_heads), jnp.int32(self.num_splits)
        rest = lax.div(block, kv_heads)
        return self.num_tiles - 1 - lax.div(rest, splits), lax.rem(rest, splits), lax.rem(block, kv_heads)


def make_grid(num_tiles: int, num_kv_heads: int, num_keys: int, *, concurrent: int) -> Grid:
    """Returns the grid for a device that runs `concurrent` of the kernel's blocks at a time.

    Where there are fewer tiles than that, each tile's keys are shared out over several blocks (as FlashDecoding does),
    unless they are so few that the blocks would end before their results can be merged.
    """
    num_splits = min(concurrent // (num_tiles * num_kv_heads), num_keys // KEYS_OF_A_SPLIT)
    return Grid(num_tiles, max(num_splits, 1), num_kv_heads)


def make_tiles(
    q: Float[Array, "queries heads head_dim"],
    positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    *,
    num_kv_heads: int,
    tile_rows: int,
    block_keys: int,
) -> QueryTiles:
    """Packs queries into tiles of `tile_rows` rows, the last one padded."""
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


def _key_blocks(
    last_visible: Int[Array, " rows"], first_visible: Int[Array, " rows"], tile_rows: int, block_keys: int
) -> KeyBlocks:
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


def cost(
    q: Float[Array, "queries heads head_dim"] | jax.ShapeDtypeStruct,
    k: Float[Array, "*layers keys kv_heads head_dim"] | jax.ShapeDtypeStruct,
    *,
    tile_rows: int,
    block_keys: int,
) -> pl.CostEstimate:
    """Returns what attention in tiles of these sizes costs, as declared to XLA before positions are known.

    Assumes queries spread evenly over the keys, each seeing all keys before it: so are those of a full prefill and the
    survivors of a blend. A tile reads the key and value blocks up to its last query's position.
    """
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape[-3:]
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


def unpack_rows(
    packed: Shaped[Array, "kv_heads rows *rest"], num_queries: int, num_heads: int
) -> Shaped[Array, "queries heads *rest"]:
    """Undoes the packing of queries into rows."""
    num_kv_heads, _, *rest = packed.shape
    group = num_heads // num_kv_heads
    rows = packed[:, : num_queries * group].reshape(num_kv_heads, num_queries, group, *rest)
    return jnp.moveaxis(rows, 0, 1).reshape(num_queries, num_heads, *rest)


def merge_splits(
    out: Float[Array, "splits kv_heads rows head_dim"],
    lse: Float[Array, "splits kv_heads rows"],
    num_queries: int,
    num_heads: int,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Returns output and log-sum-exp of queries, from the rows' output and log-sum-exp over each range of their keys.

    Source: FlashAttention (arXiv 2205.14135), the same rescaling that joins blocks of keys.
    """
    if out.shape[0] == 1:
        return unpack_rows(out[0], num_queries, num_heads), unpack_rows(lse[0], num_queries, num_heads)
    # Padding rows go first: most rows of a tile that holds a single query.
    parts, lse = (jax.vmap(lambda x: unpack_rows(x, num_queries, num_heads))(x) for x in (out, lse))
    merged_lse = lax.reduce(lse, np.float32(-np.inf), jnp.logaddexp, (0,))
    weights = jnp.exp(lse - jnp.where(merged_lse == -jnp.inf, 0.0, merged_lse)[None])
    merged = (weights[..., None] * parts.astype(jnp.float32)).sum(axis=0)
    return merged.astype(out.dtype), merged_lse
