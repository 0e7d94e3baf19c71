"""Decoding after a prefill: tokens through the layers over a growing cache, several before the host sees any."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache, LayerKV
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sampling import Draw, next_token
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

MOST_AT_ONCE = 64  # tokens that one call of `decode_tokens` may decode


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
        hidden, cache = run_rows(params, cache, last[None], position + count, angles, config=config)
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
    hidden, cache = run_rows(params, cache, token_ids, position, angles, config=config)
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
    hidden, cache = run_rows(params, cache, token_ids, position, angles, config=config, count=count)
    logits = embedder(params, config).logits(lax.dynamic_slice_in_dim(hidden, count - 1, 1))[0]
    return Extended(logits, jnp.argmax(logits).astype(jnp.int32), cache.cache())


def run_rows(
    params: Params,
    cache: GrowingCache,
    token_ids: Int[Array, " new"],
    position: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "new hidden"], GrowingCache]:
    """As `extend`, but returns the hidden states after the last layer; tokens beyond `count` are padding."""
    num_new = token_ids.shape[0]
    at = position + jnp.arange(num_new, dtype=jnp.int32)
    end = position + (num_new if count is None else count)
    rows = rows_at(embedder(params, config).embed(token_ids), at, angles)

    def body(carry: tuple[Rows, GrowingCache], index: Int[Array, ""] | int) -> tuple[tuple[Rows, GrowingCache], None]:
        rows, cache = carry
        layer = layer_at(params, config, index)
        q, k_fresh, v_fresh = layer.queries_keys_values(rows.hidden)
        turned = rows.angles.of_layer(config, index)
        cache = cache.with_rows(index, position, LayerKV(apply_rope(k_fresh, *turned), v_fresh))
        starts = layer_starts(config, index, at)
        attended = attend(layer, rows, q, cache.layer(index), angles=turned, starts=starts, kv_length=end)
        return (attended.rows, cache), None

    (rows, cache), _ = scan_layers(params, body, (rows, cache), range(config.num_layers))
    return rows.hidden, cache
