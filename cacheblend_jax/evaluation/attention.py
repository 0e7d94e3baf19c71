"""What a prefill's attention was like, found by attending once more over the cache that it returned."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles, rope_tables
from cacheblend_jax.model.transformer import Rows, attend, embedder, layer_at, layer_starts, rows_at, scan_layers
from pallas_kernels import soft_capped

QUERY_PADDING = 32  # questions are padded to a multiple of it: few shapes to compile
TILE = 32  # queries whose attention to all keys is in memory at a time


def attention_deviation_by_layer(
    model: Model, token_ids: np.ndarray, first_query: int, cache: KVCache, reference: KVCache
) -> np.ndarray:
    """Returns the attention deviation of each layer, float32 `[layers]`.

    How far the attention of the question, the tokens from `first_query` on, is from full prefill's: the L2 distance of
    the two attention matrices (all heads) over the L2 norm of the true one. Both caches may be padded. Source:
    CacheBlend (arXiv 2405.16444) §4.2, definition 2.
    """
    keys, length = cache.k.shape[1], token_ids.size
    queries = -(-(length - first_query) // QUERY_PADDING) * QUERY_PADDING
    positions = _padded(np.arange(first_query, length), queries, keys)
    question = _padded(token_ids[first_query:], queries, 0)
    angles = rope_tables(model.config, keys)
    return np.asarray(
        _attention_deviation(model.params, model.config, question, positions, length, cache, reference, angles)
    )


def attention_between_parts(model: Model, out: PrefillResult, part_lengths: tuple[int, ...]) -> np.ndarray:
    """Returns the attention that a prompt's parts paid to each other, `[layers - 1, parts, parts]`.

    That is, of a prefill, how much of its attention (all heads) a token of the first part paid to the tokens of the
    second, on average; what it paid to sinks is in none of them. A token whose stored KV the next layer kept paid
    none: it was not in the prompt when that was computed. In the last layer only the prompt's last token attends; it is
    left out.

    Args:
        part_lengths: tokens of each of the parts, which together are the prompt; empty parts attend to nothing.
    """
    keys, length = out.padded_cache.k.shape[1], out.token_ids.size
    part = np.full(keys, len(part_lengths), np.int32)
    part[:length] = np.repeat(np.arange(len(part_lengths)), part_lengths)
    goes_on = out.recomputed[1:]  # a token that the next layer computes has attended in this one
    queries = np.flatnonzero(goes_on.any(axis=0))
    if 2 * queries.size > length:  # of most tokens, or of all: one program
        queries = np.arange(length)
        positions = _padded(queries, keys, keys)
    else:
        positions = _padded(queries, -(-queries.size // QUERY_PADDING) * QUERY_PADDING, keys)
    attends = np.zeros((model.config.num_layers, positions.size), bool)
    attends[:-1, : queries.size] = goes_on[:, queries]
    token_ids = _padded(out.token_ids[queries], positions.size, 0)
    arrays = token_ids, positions, part, attends, np.int32(length), out.padded_cache, rope_tables(model.config, keys)
    paid = _attention_between(model.params, model.config, *arrays, num_parts=len(part_lengths))
    return np.asarray(paid)[:-1] / np.maximum(part_lengths, 1)[:, None]


def _padded(values: np.ndarray, size: int, padding: int) -> np.ndarray:
    return np.pad(values, (0, size - values.size), constant_values=padding).astype(np.int32)


class _LayerAttention(NamedTuple):
    """One layer's queries as they meet the cache: `rows` are those after the layer, `q` is rotated and scaled.

    `lse` counts sinks: weights of keys are `exp(score - lse)`.
    """

    rows: Rows
    q: Float[Array, "queries heads head_dim"]
    k: Float[Array, "keys kv_heads head_dim"]
    lse: Float[Array, "queries heads"]
    starts: Int[Array, " queries"] | None
    soft_cap: float | None


def _attend_over(
    params: Params,
    config: ModelConfig,
    index: Int[Array, ""] | int,
    rows: Rows,
    cache: KVCache,
    length: Int[Array, ""] | int,
) -> _LayerAttention:
    """Takes the rows through layer `index` over a finished cache, which has their own keys and values, too."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    layer, kv = layer_at(params, config, index), cache.layer(index)
    turned, starts = rows.angles.of_layer(config, index), layer_starts(config, index, rows.positions)
    attended = attend(layer, rows, layer.queries(rows.hidden), kv, angles=turned, starts=starts, kv_length=length)
    return _LayerAttention(attended.rows, attended.q * scale, kv.k, attended.lse, starts, config.attention_soft_cap)


@partial(jax.jit, static_argnames="config")
def _attention_deviation(
    params: Params,
    config: ModelConfig,
    question_ids: Int[Array, " queries"],
    positions: Int[Array, " queries"],
    length: Int[Array, ""] | int,
    cache: KVCache,
    reference: KVCache,
    angles: Angles,
) -> Float[Array, " layers"]:
    embedded = rows_at(embedder(params, config).embed(question_ids), positions, angles)

    def step(index: Int[Array, ""] | int, rows: Rows, kv: KVCache) -> tuple[Rows, jax.Array]:
        seen = _attend_over(params, config, index, rows, kv, length)
        return seen.rows, _probabilities(seen, rows.positions, length)

    def both(carry: tuple[Rows, Rows], index: Int[Array, ""] | int) -> tuple[tuple[Rows, Rows], jax.Array]:
        rows, seen = step(index, carry[0], cache)
        true_rows, wanted = step(index, carry[1], reference)
        return (rows, true_rows), jnp.linalg.norm((seen - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())

    return scan_layers(params, both, (embedded, embedded), range(config.num_layers))[1]


@partial(jax.jit, static_argnames=("config", "num_parts"))
def _attention_between(
    params: Params,
    config: ModelConfig,
    token_ids: Int[Array, " queries"],
    positions: Int[Array, " queries"],
    part: Int[Array, " keys"],
    attends: Bool[Array, "layers queries"],
    length: Int[Array, ""],
    cache: KVCache,
    angles: Angles,
    *,
    num_parts: int,
) -> Float[Array, "layers parts parts"]:
    """Sums over the tokens of a part, and means over the heads."""
    embedded = rows_at(embedder(params, config).embed(token_ids), positions, angles)
    paid = jax.nn.one_hot(part, num_parts, dtype=jnp.float32)
    paying = paid[jnp.minimum(positions, part.shape[0] - 1)]

    def step(rows: Rows, index: Int[Array, ""] | int) -> tuple[Rows, jax.Array]:
        seen = _attend_over(params, config, index, rows, cache, length)
        return seen.rows, _paid_between(seen, rows.positions, length, paying * attends[index][:, None], paid)

    return scan_layers(params, step, embedded, range(config.num_layers))[1]


def _paid_between(
    seen: _LayerAttention,
    positions: Int[Array, " queries"],
    length: Int[Array, ""],
    paying: Float[Array, "queries parts"],
    paid: Float[Array, "keys parts"],
) -> Float[Array, "parts parts"]:
    """Adds up the attention of the `paying` queries by the part of query and key, some queries at a time."""
    starts = jnp.zeros_like(positions) if seen.starts is None else seen.starts
    padding = -positions.shape[0] % TILE
    arrays = seen.q, seen.lse, positions, starts, paying  # the padding's queries are in no part
    tiles = [jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:]))) for x in arrays]

    def add_tile(total: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        q, lse, tile_positions, tile_starts, tile_paying = tile
        of_tile = seen._replace(q=q, lse=lse, starts=tile_starts)
        weights = _probabilities(of_tile, tile_positions, length).mean(axis=1)
        return total + tile_paying.T @ (weights @ paid), None

    parts = paid.shape[1]
    in_tiles = tuple(x.reshape(-1, TILE, *x.shape[1:]) for x in tiles)
    return lax.scan(add_tile, jnp.zeros((parts, parts), jnp.float32), in_tiles)[0]


def _probabilities(
    seen: _LayerAttention, positions: Int[Array, " queries"], length: Int[Array, ""] | int
) -> Float[Array, "queries heads keys"]:
    """The attention matrix itself: only for measuring, with few queries."""
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = seen.q.shape, seen.k.shape
    grouped = seen.q.astype(jnp.float32).reshape(num_queries, num_kv_heads, -1, head_dim)
    products = jnp.einsum("qhgd,khd->qhgk", grouped, seen.k.astype(jnp.float32))
    scores = soft_capped(products.reshape(num_queries, num_heads, num_keys), seen.soft_cap)
    keys = jnp.arange(num_keys)[None, :]
    visible = (keys <= positions[:, None]) & (positions[:, None] < length)
    if seen.starts is not None:
        visible &= keys >= seen.starts[:, None]
    return jnp.where(visible[:, None], jnp.exp(scores - seen.lse[..., None]), 0.0)
