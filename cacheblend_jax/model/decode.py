"""Decoding after a prefill: runs tokens through the layers over a growing cache, and draws the next one."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at `temperature` 0, else from the softmax, cut by `top_k` and `top_p`.

    Attributes:
        temperature: divides the logits.
        top_k: keep the `top_k` likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities sum to `top_p`; 1 keeps all (arXiv 1904.09751).
        seed: the same seed draws the same tokens; below 2³².
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise CacheBlendError(f"temperature must be at least 0 and finite, got {self.temperature!r}")
        if not is_whole_number(self.top_k, least=0, below=2**31):
            raise CacheBlendError(f"top_k must be a whole number in [0, 2^31), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise CacheBlendError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not is_whole_number(self.seed, least=0, below=2**32):
            raise CacheBlendError(f"seed must be a whole number in [0, 2^32), got {self.seed!r}")


def sample(
    logits: Float[Array, " vocab"],
    key: jax.Array,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, ""]:
    """Draws one token id; `temperature` must be positive, `top_k` 0 means no limit."""
    scaled = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(scaled, descending=True)
    ranked = scaled[order]
    vocab_size = logits.shape[0]
    rank = jnp.arange(vocab_size, dtype=jnp.int32)
    ranked = jnp.where(rank < jnp.where(top_k == 0, vocab_size, top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked)
    # A token stays unless the likelier ones reach top_p without it; the first one always stays.
    before = jnp.cumsum(probabilities) - probabilities
    ranked = jnp.where((before < top_p) | (rank == 0), ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)


def decode_step(
    params: Params,
    cache: KVCache,
    token_id: Int[Array, ""],
    position: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, " vocab"], Int[Array, ""], KVCache]:
    """Runs one token at `position` over the cache (keys rotated), which it extends by that token's K, V.

    Returns float32 logits, the greedy next token, and the cache; callers donate `cache`.
    """
    logits, cache = extend(params, cache, token_id[None], position, angles, config=config)
    return logits[0], jnp.argmax(logits[0]).astype(jnp.int32), cache


def extend(
    params: Params,
    cache: KVCache,
    token_ids: Int[Array, " new"],
    position: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "new vocab"], KVCache]:
    """Runs tokens from `position` on over the cache (keys rotated), which it extends by their K, V.

    Returns float32 logits after each of them, and the cache, which must have room for all.
    """
    num_new = token_ids.shape[0]
    at = position + jnp.arange(num_new, dtype=jnp.int32)
    rows = rows_at(embedder(params, config).embed(token_ids), at, angles)

    def body(carry: tuple[Rows, KVCache], index: Int[Array, ""] | int) -> tuple[tuple[Rows, KVCache], None]:
        rows, cache = carry
        layer = layer_at(params, config, index)
        q, k_fresh, v_fresh = layer.queries_keys_values(rows.hidden)
        turned = rows.angles.of_layer(config, index)
        k_fresh = apply_rope(k_fresh, *turned)
        place = [jnp.asarray(i, jnp.int32) for i in (index, position, 0, 0)]  # one dtype, whatever jax_enable_x64 is
        cache = KVCache(
            lax.dynamic_update_slice(cache.k, k_fresh[None], place),
            lax.dynamic_update_slice(cache.v, v_fresh[None], place),
        )
        starts = layer_starts(config, index, at)
        attended = attend(
            layer, rows, q, cache.in_place(index), angles=turned, starts=starts, kv_length=position + num_new
        )
        return (attended.rows, cache), None

    (rows, cache), _ = scan_layers(params, body, (rows, cache), range(config.num_layers))
    return embedder(params, config).logits(rows.hidden), cache
