"""The steps of a planned prefill, written once for both executors: begin, layer, border, question pass, last layer.

The resident executor runs them inside one program; the streamed executor runs each as a program of its own. Arrays are
positional arguments; what a program is compiled for is passed by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.layer_step import (
    HostOrDevice,
    LayerStep,
    PromptSequence,
    Selection,
    Survivors,
    blends_in_place,
    cross_mass,
    highest,
    last_row,
    layer_step,
)
from cacheblend_jax.blend.selectors import Evidence, Selector
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.quantised_kv import StoredLayer, layer_values
from cacheblend_jax.model.transformer import Rows, embedder, layer_at, layer_starts, rows_at
from pallas_kernels import QuantisedKV, attention_mass
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import at_each
from pallas_kernels.partition import constrained

LayerIndex = Int[Array, ""] | int


@struct.dataclass
class Request:
    """A prefill's traced half, made on the host of `numpy` arrays.

    Active tokens are those that the first layer computes: all but the exact ones, or, in full KV reuse, only forced
    ones. The position of a padding row is the cache's length.

    Attributes:
        keep: how many rows survive each border but the last, forced ones included.
        forced_rows: indices of the forced tokens among the active ones; an index of `active` is padding.
    """

    token_ids: Int[HostOrDevice, " active"]
    positions: Int[HostOrDevice, " active"]
    length: Int[HostOrDevice, ""]
    forced: Bool[HostOrDevice, " active"]
    chunk_starts: Int[HostOrDevice, " active"]
    context_length: Int[HostOrDevice, ""]
    keep: Int[HostOrDevice, " borders"]
    forced_rows: Int[HostOrDevice, " forced"]
    is_question: Bool[HostOrDevice, " forced"]
    oracle: Float[HostOrDevice, " active"]
    seed: Int[HostOrDevice, ""]


@struct.dataclass
class Prefilled:
    """What a prefill returns: logits, the greedy next token, the blended cache, and which tokens later stages had.

    (The first stage has the request's; returning what it was given, a program would copy it.)
    """

    logits: Float[Array, " vocab"]
    next_token: Int[Array, ""]
    cache: KVCache
    later_positions: tuple[Int[Array, " _"], ...]


@struct.dataclass
class TokenSignals:
    """What selection at a border reads about all active tokens, besides the K, V that its layer has just computed."""

    forced: Bool[Array, " active"]
    chunk_starts: Int[Array, " active"]
    oracle: Float[Array, " active"]
    seed: Int[Array, ""]
    cross_mass: Float[Array, " active"]
    question_mass: Float[Array, " active"]


@struct.dataclass
class ActiveRows:
    """The rows that are still computed, and the number of each among the prompt's active tokens."""

    rows: Rows
    index: Int[Array, " rows"]


def begin(
    params: Params, request: Request, sequence: PromptSequence, *, config: ModelConfig
) -> tuple[ActiveRows, KVCache]:
    """Embeds the active tokens; returns them, and the empty blended cache."""
    hidden = embedder(params, config).embed(request.token_ids)
    empty = jnp.zeros((config.num_layers, sequence.num_keys, config.num_kv_heads, config.head_dim), hidden.dtype)
    empty = constrained(empty, None, None, "kv_heads")
    rows = rows_at(hidden, request.positions, sequence.angles)
    index = jnp.arange(request.positions.shape[0], dtype=jnp.int32)
    return ActiveRows(rows, index), KVCache(empty, empty)


def begin_rows(params: Params, request: Request, sequence: PromptSequence, *, config: ModelConfig) -> ActiveRows:
    """As `begin`, where there is a cache already."""
    return begin(params, request, sequence, config=config)[0]


def token_signals(request: Request, question_mass: Float[Array, " keys"] | None) -> TokenSignals:
    """Returns what is known before the first layer; `question_mass` is every key's, where the selector needs it."""
    zeros = jnp.zeros(request.positions.shape[0], jnp.float32)
    if question_mass is None:
        of_active = zeros
    else:
        of_active = question_mass[jnp.minimum(request.positions, question_mass.shape[0] - 1)]
    return TokenSignals(request.forced, request.chunk_starts, request.oracle, request.seed, zeros, of_active)


def plain_layer(
    params: Params,
    active: ActiveRows,
    cached: StoredLayer | None,
    blended: KVCache,
    sequence: PromptSequence,
    index: LayerIndex,
    *,
    config: ModelConfig,
    nothing_cached: bool = False,
) -> tuple[ActiveRows, KVCache]:
    """Takes the rows through layer `index`, and blends their KV into the layer's in the cache, in place.

    Args:
        cached: the layer's stored KV, which is first placed into the cache, or, where it is quantised, dequantised as
            it is blended into it; `None` where it is there already.
        nothing_cached: there is no stored KV, here or there: the rows are all keys.
    """
    return _advance(params, active, cached, blended, sequence, index, config, nothing_cached)[:2]


def cross_mass_layer(
    params: Params,
    active: ActiveRows,
    cached: StoredLayer | None,
    blended: KVCache,
    sequence: PromptSequence,
    index: LayerIndex,
    signals: TokenSignals,
    context_length: Int[Array, ""],
    *,
    config: ModelConfig,
    nothing_cached: bool = False,
) -> tuple[ActiveRows, KVCache, TokenSignals]:
    """As `plain_layer` over all active tokens; also measures the attention that they pay to other chunks."""
    after, blended, step = _advance(params, active, cached, blended, sequence, index, config, nothing_cached)
    starts = layer_starts(config, index, active.rows.positions)
    mass = cross_mass(step, signals.chunk_starts, context_length, sequence, starts, config)
    return after, blended, replace(signals, cross_mass=mass)


def border_layer(
    params: Params,
    active: ActiveRows,
    cached: StoredLayer | None,
    blended: KVCache,
    sequence: PromptSequence,
    index: LayerIndex,
    signals: TokenSignals,
    keep: Int[Array, ""],
    *,
    config: ModelConfig,
    nothing_cached: bool = False,
    selector: Selector,
    deviation: str,
    room: int,
) -> tuple[ActiveRows, KVCache]:
    """As `plain_layer`, but only the `keep` rows that score highest attend and go on.

    Args:
        keep: how many rows go on, at most `room`.
        deviation: what the selector's KV deviation is measured on.
    """

    def stored_at(at: Int[Array, " rows"]) -> LayerKV:
        if cached is None:
            return LayerKV(at_each(blended.k, (index, at)), at_each(blended.v, (index, at)))
        rows = jax.tree.map(lambda x: at_each(x, at), cached)
        return layer_values(rows, layer_at(params, config, index).key_bias, blended.k.dtype)

    def choose(fresh: LayerKV) -> Survivors:
        evidence = _evidence(fresh, stored_at, sequence.num_keys, active, signals, deviation)
        return highest(selector.scores(evidence), at_each(signals.forced, active.index), evidence.valid, keep, room)

    selection = Selection(room, choose)
    return _advance(params, active, cached, blended, sequence, index, config, nothing_cached, selection)[:2]


def last_layer(
    params: Params,
    active: ActiveRows,
    cached: StoredLayer | None,
    blended: KVCache,
    sequence: PromptSequence,
    index: LayerIndex,
    *,
    config: ModelConfig,
    nothing_cached: bool = False,
) -> tuple[Float[Array, " vocab"], Int[Array, ""], KVCache]:
    """As `plain_layer`, but only the last token attends; returns its logits, the greedy next token and the cache."""
    only_last = Selection(1, lambda _: last_row(active.rows, sequence))
    active, blended, _ = _advance(params, active, cached, blended, sequence, index, config, nothing_cached, only_last)
    logits = embedder(params, config).logits(active.rows.hidden)[0]
    return logits, jnp.argmax(logits).astype(jnp.int32), blended


def begin_question_pass(
    request: Request, active: ActiveRows, sequence: PromptSequence
) -> tuple[Rows, Float[Array, " keys"]]:
    """Returns the rows of the question pass (the forced tokens), and zeros for the attention to every key."""
    num_active, num_keys = request.token_ids.shape[0], sequence.num_keys
    is_row = request.forced_rows < num_active
    at = jnp.minimum(request.forced_rows, num_active - 1)
    return active.rows.take(at, is_row, num_keys), jnp.zeros(num_keys, jnp.float32)


def question_layer(
    params: Params,
    rows: Rows,
    mass: Float[Array, " keys"],
    cached: StoredLayer,
    is_question: Bool[Array, " forced"],
    sequence: PromptSequence,
    index: LayerIndex,
    *,
    config: ModelConfig,
) -> tuple[Rows, Float[Array, " keys"]]:
    """One layer of the question pass: adds the attention that the question pays to every key.

    The pass is full KV reuse by the forced tokens alone; it writes no cache.
    """
    with jax.named_scope("question_pass"):
        step = layer_step(params, config, index, rows, cached, sequence)
        starts = layer_starts(config, index, rows.positions)
        lse = jnp.where(is_question[:, None], step.lse, -jnp.inf)
        mass += attention_mass(
            step.q,
            step.blended.k,
            lse,
            rows.positions,
            q_starts=starts,
            kv_length=sequence.length,
            **config.score_options,
        )
        return step.rows, mass


def _advance(
    params: Params,
    active: ActiveRows,
    cached: StoredLayer | None,
    blended: KVCache,
    sequence: PromptSequence,
    index: LayerIndex,
    config: ModelConfig,
    nothing_cached: bool,
    selection: Selection | None = None,
) -> tuple[ActiveRows, KVCache, LayerStep]:
    """Takes the rows through a layer; `cached` is its stored KV, `None` where that is in the cache, or there is none.

    Where the platform blends in place, stored values become the cache's layer first, and codes are dequantised into it
    as they are blended; elsewhere a layer is blended by itself, then written into the cache.
    """
    if cached is not None and not blends_in_place(current_target().platform):
        step = layer_step(params, config, index, active.rows, cached, sequence, selection)
        after = ActiveRows(step.rows, at_each(active.index, step.kept))
        return after, blended.with_layer(index, LayerKV(step.blended.k, step.blended.v)), step
    stored = cached if isinstance(cached, QuantisedKV) else None
    if isinstance(cached, LayerKV):
        blended = blended.with_layer(index, cached)
    in_cache = blended.in_place(index, is_empty=nothing_cached, stored=stored)
    step = layer_step(params, config, index, active.rows, in_cache, sequence, selection)
    return ActiveRows(step.rows, at_each(active.index, step.kept)), KVCache(step.blended.k, step.blended.v), step


def _evidence(
    fresh: LayerKV,
    stored_at: Callable[[Int[Array, " rows"]], LayerKV],
    num_keys: int,
    active: ActiveRows,
    signals: TokenSignals,
    deviation: str,
) -> Evidence:
    """Returns what a selector sees: the signals of the current rows, and this layer's K, V.

    Args:
        stored_at: returns the stored KV of the keys at some positions.
    """
    positions, index = active.rows.positions, active.index
    stored = stored_at(jnp.minimum(positions, num_keys - 1))
    return Evidence(
        valid=positions < num_keys,
        positions=positions,
        chunk_starts=at_each(signals.chunk_starts, index),
        index=index,
        k_fresh=fresh.k,
        v_fresh=fresh.v,
        k_cached=stored.k,
        v_cached=stored.v,
        cross_mass=at_each(signals.cross_mass, index),
        question_mass=at_each(signals.question_mass, index),
        oracle=at_each(signals.oracle, index),
        seed=signals.seed,
        part=deviation,
    )
