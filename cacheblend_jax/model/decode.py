"""Decoding after a prefill: tokens through the layers over a growing cache, several before the host sees any."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache, LayerKV
from cacheblend_jax.model.layer_cache import LayerCache
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sampling import Draw, next_token
from cacheblend_jax.model.slot_cache import SlotCache
from cacheblend_jax.model.transformer import (
    Rows,
    attend,
    embedder,
    layer_at,
    layer_starts,
    rows_at,
    scan_layers,
)
from pallas_kernels import apply_rope
from pallas_kernels.indexing import part_of
from pallas_kernels.partition import current_partition, rows_called

MOST_AT_ONCE = 64  # tokens that one call of `decode_tokens` may decode
Cache = TypeVar("Cache", GrowingCache, LayerCache, SlotCache)


class Decoded(NamedTuple):
    """What `decode_tokens` returns: `num_tokens` tokens, the ids after them 0, and the cache."""

    token_ids: Int[Array, " most_at_once"]
    num_tokens: Int[Array, ""]
    cache: GrowingCache


def decode_tokens(
    params: Params,
    cache: GrowingCache,
    token_id: Int[Array, ""],
    position: Int[Array, ""],
    number: Int[Array, ""],
    limit: Int[Array, ""],
    is_stop: Bool[Array, " vocab"],
    draw: Draw,
    angles: Angles,
    *,
    config: ModelConfig,
) -> Decoded:
    """Decodes up to `limit` tokens, at most `MOST_AT_ONCE`, ending after the first stop token (traceable).

    Args:
        cache: must have room for their K, V; callers donate it.
        token_id: the last token of the answer so far, and not a stop token.
        position: its place.
        number: how many tokens the answer has so far.
    """

    def goes_on(state: tuple[Int[Array, ""], Decoded]) -> Bool[Array, ""]:
        last, decoded = state
        return (decoded.num_tokens < jnp.minimum(limit, MOST_AT_ONCE)) & ~is_stop[last]

    def step(state: tuple[Int[Array, ""], Decoded]) -> tuple[Int[Array, ""], Decoded]:
        last, (token_ids, count, cache) = state
        hidden, cache = run_rows(params, cache, last[None], (position + count)[None], angles, config=config)
        logits = embedder(params, config).logits(hidden)[0]
        token = next_token(logits, draw, number + count)
        return token, Decoded(token_ids.at[count].set(token), count + 1, cache)

    none = Decoded(jnp.zeros(MOST_AT_ONCE, jnp.int32), jnp.int32(0), cache)
    return lax.while_loop(goes_on, step, (token_id, none))[1]


def extend(
    params: Params,
    cache: GrowingCache,
    token_ids: Int[Array, " new"],
    position: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "new vocab"], GrowingCache]:
    """Runs tokens from `position` on over the cache, which it extends by their K, V, and which must have room for all.

    Returns float32 logits after each of them, and the cache.
    """
    hidden, cache = run_rows(params, cache, token_ids, _from(position, token_ids), angles, config=config)
    return embedder(params, config).logits(hidden), cache


class Extended(NamedTuple):
    """What `extend_prompt` returns: logits after the last token, the greedy next token, and the cache."""

    logits: Float[Array, " vocab"]
    next_token: Int[Array, ""]
    cache: KVCache


def extend_prompt(
    params: Params,
    cache: GrowingCache,
    token_ids: Int[Array, " padded"],
    position: Int[Array, ""],
    count: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
) -> Extended:
    """Prefills `count` tokens over a cache of those before them: causal, position-exact (traceable).

    Args:
        cache: must have room for all of `token_ids`, padding included; callers donate it.
        token_ids: those beyond `count` are padding, and what they write is overwritten by what comes later.
    """
    at = _from(position, token_ids)
    hidden, cache = run_rows(params, cache, token_ids, at, angles, config=config, end=position + count)
    logits = embedder(params, config).logits(part_of(hidden, count - 1, 1))[0]
    return Extended(logits, jnp.argmax(logits).astype(jnp.int32), cache.cache())


def _from(position: Int[Array, ""], token_ids: Int[Array, " new"]) -> Int[Array, " new"]:
    return position + jnp.arange(token_ids.shape[0], dtype=jnp.int32)


def run_rows(
    params: Params,
    cache: Cache,
    token_ids: Int[Array, " new"],
    positions: Int[Array, " new"],
    angles: Angles,
    *,
    config: ModelConfig,
    end: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "new hidden"], Cache]:
    """Runs tokens at their positions through all layers; the cache takes their K, V and says which keys each sees.

    Those at `end` or beyond are padding.

    Returns the hidden states after the last layer, and the cache.
    """
    with rows_called(cache.rows_axis(current_partition())):
        return _run_rows(params, cache, token_ids, positions, angles, config, end)


def _run_rows(
    params: Params,
    cache: Cache,
    token_ids: Int[Array, " new"],
    positions: Int[Array, " new"],
    angles: Angles,
    config: ModelConfig,
    end: Int[Array, ""] | None,
) -> tuple[Float[Array, "new hidden"], Cache]:
    rows = rows_at(embedder(params, config).embed(token_ids), positions, angles)

    def body(carry: tuple[Rows, Cache], index: Int[Array, ""] | int) -> tuple[tuple[Rows, Cache], None]:
        rows, cache = carry
        return run_layer(params, cache, rows, index, config=config, end=end), None

    (rows, cache), _ = scan_layers(params, body, (rows, cache), range(config.num_layers))
    return rows.hidden, cache


def run_layer(
    params: Params,
    cache: Cache,
    rows: Rows,
    index: Int[Array, ""] | int,
    *,
    config: ModelConfig,
    end: Int[Array, ""] | None = None,
) -> tuple[Rows, Cache]:
    """Runs rows through one layer over the cache, which takes their K, V; those at `end` or beyond are padding."""
    positions = rows.positions
    layer = layer_at(params, config, index)
    q, k_fresh, v_fresh = layer.queries_keys_values(rows.hidden)
    turned = rows.angles.of_layer(config, index)
    cache = cache.with_rows(index, positions, LayerKV(apply_rope(k_fresh, *turned), v_fresh))
    starts, lengths = layer_starts(config, index, positions), cache.lengths(positions) if end is None else end
    attended = attend(layer, rows, q, cache.layer(index), angles=turned, starts=starts, kv_length=lengths)
    return attended.rows, cache
