"""Attention of scattered queries, each at its own position, over a whole KV cache: the one attention of the project.

Full prefill is the case `q_positions = 0 … n-1`, decoding that of one query, the blend that of a few survivors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve_implementation

MASKED = -1e30  # finite: a fully masked row stays free of NaN until it is overwritten by zeros


def selective_attention(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    *,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Array, "queries heads head_dim"]
    | tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]
):
    """Causal attention of queries at given positions: the query at position p sees keys `start … p`, nothing later.

    `q_positions` ascend (ties are legal; not checked, since they are traced). A position of `kv_length` or more is
    padding and yields zeros, as does a query that sees no key; their log-sum-exp is `-inf`. Query head h reads KV
    head `h // (heads // kv_heads)`.

    Args:
        q_starts: first visible key of each query (its chunk's start, say); 0 by default.
        kv_length: valid keys, traced or not; keys beyond it are never read into a result, not even NaN. All by default.
        window: the query at p sees at most the `window` keys up to and including p.
        scale: factor of the scores; `head_dim ** -0.5` by default.
        return_lse: also return float32 `[queries, heads]`, the log-sum-exp of the visible scaled scores.
        implementation: `None` (best for the platform) or `"xla"` (blockwise; memory O(queries x block)).

    Work is proportional to what is visible: a tile of queries starts at its first visible key block and stops at its
    last. Accumulation is in float32; the result has the dtype of `q`.

    Raises:
        ValueError: shapes, head counts, dtypes, `kv_length`, `window` or `implementation` that do not fit.

    Source: FlashAttention (arXiv 2205.14135) for the online softmax; CacheBlend (arXiv 2405.16444) §4.2 for the use.
    """
    _validate(q, k, v, q_positions, q_starts, kv_length, window)
    resolve_implementation(implementation, "selective_attention")
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    kv_length = jnp.minimum(jnp.asarray(num_keys if kv_length is None else kv_length, jnp.int32), num_keys)
    starts = _first_visible(q_positions, q_starts, window)
    scale = head_dim**-0.5 if scale is None else scale
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
        # One tile reads each key once, where it lies; several share a copy in the order that their products want.
        stored = _Stored(k, v) if num_tiles == 1 else _Stored(k.transpose(1, 0, 2), v.transpose(1, 0, 2), True)

        def attend_tile(_: None, tile: _Tile) -> tuple[None, tuple[jax.Array, jax.Array]]:
            # Heads that share a KV head become rows of one matrix product: [kv_heads, group * tile, head_dim].
            rows = tile.q.reshape(tile_size, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
            rows = rows.reshape(num_kv_heads, group * tile_size, head_dim)
            out, lse = _attend_tile(tile, rows, stored, kv_length, scale, blocks)
            out = out.reshape(num_kv_heads, group, tile_size, head_dim).transpose(2, 0, 1, 3)
            lse = lse.reshape(num_kv_heads, group, tile_size).transpose(2, 0, 1)
            return None, (out.reshape(tile.q.shape), lse.reshape(tile_size, num_heads))

        _, (out, lse) = lax.scan(attend_tile, None, tiles)
        out = out.reshape(-1, num_heads, head_dim)[:num_queries]
        return (out, lse.reshape(-1, num_heads)[:num_queries]) if return_lse else out


class BlockSizes(NamedTuple):
    """Keys a step: `inner` (a multiple of `edge`) where all the tile's queries see every key, `edge` where not."""

    inner: int
    edge: int


def block_sizes(num_queries: int, num_keys: int) -> tuple[int, BlockSizes]:
    """Returns queries a tile and keys a step of the XLA implementation, as they were fastest on a CPU.

    Tiles are equal, so that the last one is not mostly padding: its queries see the most keys. Steps are large, since
    each operation of a step has its own cost. Scattered queries span several times their number in positions: little
    of what a tile sees is common to all of it, and its tiles are smaller.
    """
    dense = num_queries * 2 > num_keys
    tiles = max(round(num_queries / (352 if dense else 224)), 1)
    tile = -(-num_queries // tiles)
    tile = -(-tile // 8) * 8
    edge = min(tile if dense else max(num_keys // (2 * tiles), 512), 768, num_keys)
    return tile, BlockSizes(inner=2 * edge if dense and 2 * edge <= num_keys else edge, edge=edge)


class _Tile(NamedTuple):
    q: jax.Array  # [tile, heads, head_dim]
    positions: jax.Array  # [tile]
    starts: jax.Array | None  # [tile]


class _Stored(NamedTuple):
    """Keys and values, `[keys, kv_heads, head_dim]` or, if `head_major`, `[kv_heads, keys, head_dim]`."""

    k: jax.Array
    v: jax.Array
    head_major: bool = False

    @property
    def num_keys(self) -> int:
        return self.k.shape[int(self.head_major)]

    def block(self, begin: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Returns `size` keys and values from `begin` on, `[kv_heads, size, head_dim]`."""
        k, v = (lax.dynamic_slice_in_dim(x, begin, size, axis=int(self.head_major)) for x in (self.k, self.v))
        return (k, v) if self.head_major else (k.transpose(1, 0, 2), v.transpose(1, 0, 2))


class _Softmax(NamedTuple):
    """The online softmax's state of one tile's rows."""

    maximum: jax.Array  # [kv_heads, rows]
    total: jax.Array  # [kv_heads, rows]
    weighted: jax.Array  # [kv_heads, rows, head_dim]


def _attend_tile(
    tile: _Tile,
    rows: jax.Array,
    stored: _Stored,
    kv_length: jax.Array,
    scale: float,
    blocks: BlockSizes,
) -> tuple[jax.Array, jax.Array]:
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
        # A block that would stick out of the array is moved back; the keys seen before are masked.
        begin = jnp.minimum(index * block, num_keys - block)
        key_block, value_block = stored.block(begin, block)
        scores = jnp.einsum("hqd,hkd->hqk", query_rows, key_block, preferred_element_type=jnp.float32)
        if not float32_rows:
            scores = scores * scale
        if masked:
            column = begin + jnp.arange(block, dtype=jnp.int32)
            visible = (column >= index * block) & (column >= row_starts[..., 0, None]) & (column <= row_positions)
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
        """Runs over the keys `[begin, end)`, both multiples of `block` or, for `end`, past the last visible key."""
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


def attention_mass(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    lse: Float[Array, "queries heads"],
    q_positions: Int[Array, " queries"],
    *,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Array, " keys"]:
    """Attention that each key receives from all the queries: the sum of its softmax weights over queries and heads.

    `lse` is what `selective_attention(..., return_lse=True)` returned for the same arguments; queries whose `lse` is
    `-inf` (padding) add nothing. Memory O(heads x 8 x keys). The sum over keys is heads x valid queries.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    kv_length = num_keys if kv_length is None else kv_length
    starts = _first_visible(q_positions, q_starts, window)
    starts = jnp.zeros_like(q_positions) if starts is None else starts
    column = jnp.arange(num_keys, dtype=jnp.int32)

    def add_tile(mass: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows, row_lse, positions, first = tile
        rows = rows.reshape(-1, num_kv_heads, group, head_dim)
        scores = jnp.einsum("qhgd,khd->hgqk", rows, k, preferred_element_type=jnp.float32) * scale
        row_lse = row_lse.reshape(-1, num_kv_heads, group, 1).transpose(1, 2, 0, 3)
        visible = (column >= first[:, None]) & (column <= positions[:, None]) & (column < kv_length)
        weights = jnp.where(visible & (row_lse > -jnp.inf), jnp.exp(scores - row_lse), 0.0)
        return mass + weights.sum(axis=(0, 1, 2)), None

    tile_size = min(8, num_queries)
    padding = -num_queries % tile_size
    tiles = (
        jnp.pad(q, ((0, padding), (0, 0), (0, 0))),
        jnp.pad(lse, ((0, padding), (0, 0)), constant_values=-jnp.inf),
        jnp.pad(q_positions, (0, padding)),
        jnp.pad(starts, (0, padding)),
    )
    tiles = jax.tree.map(lambda x: x.reshape(-1, tile_size, *x.shape[1:]), tiles)
    with jax.named_scope("attention_mass"):
        mass, _ = lax.scan(add_tile, jnp.zeros(num_keys, jnp.float32), tiles)
    return mass


def _first_visible(q_positions: jax.Array, q_starts: jax.Array | None, window: int | None) -> jax.Array | None:
    if window is None:
        return q_starts
    first_in_window = jnp.maximum(q_positions - (window - 1), 0)
    return first_in_window if q_starts is None else jnp.maximum(q_starts, first_in_window)


def selective_attention_reference(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    *,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """What `selective_attention(..., return_lse=True)` means, in plain `jnp` over a dense mask, in the dtype of `q`."""
    num_keys, num_kv_heads, head_dim = k.shape
    kv_length = num_keys if kv_length is None else kv_length
    starts = _first_visible(q_positions, q_starts, window)
    starts = jnp.zeros_like(q_positions) if starts is None else starts
    column = jnp.arange(num_keys)
    valid = (q_positions < kv_length)[:, None]
    visible = (column >= starts[:, None]) & (column <= q_positions[:, None]) & (column < kv_length) & valid
    k, v = (jnp.where((column < kv_length)[:, None, None], x, 0) for x in (k, v))
    k, v = (jnp.repeat(x, q.shape[1] // num_kv_heads, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (head_dim**-0.5 if scale is None else scale)
    scores = jnp.where(visible, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("hqk,khd->qhd", weights, v), lse.T


def _validate(q, k, v, q_positions, q_starts, kv_length, window) -> None:
    def complain(name: str, got: object, expected: str) -> None:
        raise ValueError(f"selective_attention: {name} must be {expected}, got {got}")

    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3:
            complain(name, array.shape, "of rank 3, [tokens, heads, head_dim]")
    if v.shape != k.shape:
        complain("v", v.shape, f"of k's shape {k.shape}")
    if q.shape[2] != k.shape[2]:
        complain("q", q.shape, f"of k's head_dim {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        complain("q's heads", q.shape[1], f"a multiple of k's {k.shape[1]} kv_heads")
    if not q.dtype == k.dtype == v.dtype:
        complain("q, k and v", f"{q.dtype}, {k.dtype}, {v.dtype}", "of one dtype")
    for name, array in (("q_positions", q_positions), ("q_starts", q_starts)):
        if array is not None and (array.shape != q.shape[:1] or not jnp.issubdtype(array.dtype, jnp.integer)):
            complain(name, f"{array.dtype}{list(array.shape)}", f"integers of shape [{q.shape[0]}]")
    if isinstance(kv_length, int) and not 0 <= kv_length <= k.shape[0]:
        complain("kv_length", kv_length, f"in [0, {k.shape[0]}]")
    if window is not None and window < 1:
        complain("window", window, "at least 1")
