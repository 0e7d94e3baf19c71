"""Decoding by a program for each layer: how a CPU decodes a model whose weights are large.

XLA for CPUs multiplies by no part of an array, so that a loop over stacked layers copies each layer's weights and KV
out of their stacks for every token; and a program with all layers written out takes half a minute to compile. Here each
layer's weights and cache are arrays of their own, one small program serves all layers, and the loops are on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.decode import run_layer
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.layer_cache import CacheByLayer, LayerCache, layer_with_room
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sampling import Draw, next_token
from cacheblend_jax.model.transformer import Rows, embedder, rows_at

Run = Callable[..., Any]  # `runtime.programs.Runner`, or what stands in for it over shapes


class DecodedByLayer(NamedTuple):
    """What `decode_by_layer` returns: the tokens, at most as many as were asked for, and the cache."""

    token_ids: Int[np.ndarray, " tokens"]
    num_tokens: int
    cache: CacheByLayer


def cache_by_layer(run: Run, cache: KVCache, num_keys: int) -> CacheByLayer:
    """Copies a cache into one of `num_keys` keys for each layer."""
    layers = range(cache.k.shape[0])
    return CacheByLayer(tuple(run(layer_with_room, cache, np.int32(layer), num_keys=num_keys) for layer in layers))


def decode_by_layer(
    run: Run,
    params: Params,
    cache: CacheByLayer,
    token_id: int,
    position: int,
    number: int,
    limit: int,
    is_stop: Bool[np.ndarray, " vocab"],
    draw: Draw,
    angles: Angles,
    *,
    config: ModelConfig,
) -> DecodedByLayer:
    """Decodes up to `limit` tokens, ending after the first stop token: the tokens of `decode_tokens`.

    Args:
        run: runs a function as a program.
        params: by layer.
        cache: must have room for their K, V, and is lost.
        token_id, position, number: as in `decode_tokens`.
    """
    layers = _layers(params, config)
    token_ids: list[int] = []
    while len(token_ids) < limit:
        count = len(token_ids)
        token, cache = _step(run, layers, cache, token_id, position + count, number + count, draw, angles, config)
        token_id = int(token)
        token_ids.append(token_id)
        if is_stop[token_id]:
            break
    return DecodedByLayer(np.asarray(token_ids, np.int32), len(token_ids), cache)


def compile_decoding_by_layer(
    run: Run, params: Params, cache: CacheByLayer, draw: Draw, angles: Angles, *, config: ModelConfig
) -> None:
    """Compiles what `decode_by_layer` runs, over shapes."""
    _step(run, _layers(params, config), cache, 0, 0, 0, draw, angles, config)


def _layers(params: Params, config: ModelConfig) -> list[Params]:
    return [params.only_layer(index) for index in range(config.num_layers)]


def _step(
    run: Run,
    layers: list[Params],
    cache: CacheByLayer,
    token_id: int,
    position: int,
    number: int,
    draw: Draw,
    angles: Angles,
    config: ModelConfig,
) -> tuple[Any, CacheByLayer]:
    """Returns the next token, and the cache; of shapes, shapes."""
    rows = run(embedded_row, layers[0], np.int32(token_id), np.int32(position), angles, config=config)
    extended: list[LayerCache] = []
    for index, (params, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        rows, layer = run(decode_layer, params, layer, rows, np.int32(index), donate=("cache",), config=config)
        extended.append(layer)
    token = run(token_after, layers[0], rows, draw, np.int32(number), config=config)
    return token, CacheByLayer(tuple(extended))


def embedded_row(
    params: Params, token_id: Int[Array, ""], position: Int[Array, ""], angles: Angles, *, config: ModelConfig
) -> Rows:
    """Returns a token as the row that layers run (traceable)."""
    return rows_at(embedder(params, config).embed(token_id[None]), position[None], angles)


def decode_layer(
    params: Params, cache: LayerCache, rows: Rows, index: Int[Array, ""], *, config: ModelConfig
) -> tuple[Rows, LayerCache]:
    """Runs a row through a layer (traceable)."""
    return run_layer(params, cache, rows, index, config=config)


def token_after(
    params: Params, rows: Rows, draw: Draw, number: Int[Array, ""], *, config: ModelConfig
) -> Int[Array, ""]:
    """Draws the token after a row that all layers have run (traceable)."""
    return next_token(embedder(params, config).logits(rows.hidden)[0], draw, number)
