"""The resident executor: a whole prefill as one program of scans, with all cached KV on the device.

But on TPUs, stored KV becomes blended KV in place, layer by layer.

It reads like the paper: the layers up to the check layer run over all active tokens; there, HKVD tokens are selected;
then stages of layers run over fewer and fewer of them; last come the logits. Nothing returns to the host in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheblend_jax.blend.layer_step import (
    HostOrDevice,
    PromptSequence,
    blends_in_place,
    layer_step,
    once_known,
)
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import (
    ActiveRows,
    LayerIndex,
    Prefilled,
    Request,
    begin,
    begin_question_pass,
    border_layer,
    cross_mass_layer,
    last_layer,
    plain_layer,
    question_layer,
    token_signals,
)
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.quantised_kv import StoredCache, stored_layer
from cacheblend_jax.model.transformer import Rows, embedder, layer_at, rows_at, scan_layers
from pallas_kernels.dispatch import current_target

_State = tuple[ActiveRows, KVCache]  # the rows, and the blended cache, filled layer by layer


def prefill(
    params: Params,
    request: Request,
    cached: StoredCache | None,
    sequence: PromptSequence,
    *,
    config: ModelConfig,
    plan: Plan,
) -> Prefilled:
    """Runs a planned prefill (traceable; `config` and `plan` are static).

    Args:
        cached: stored K (before RoPE) and V of all layers; finite where nothing is stored. `None` for a plan with
            `nothing_cached`. Donated, it becomes the blended cache, where the platform blends in place. Quantised, it
            stays as it is: each layer is dequantised on its way into the blended cache.
    """
    active, empty = begin(params, request, sequence, config=config)
    in_place = isinstance(cached, KVCache) and blends_in_place(current_target().platform)
    mass = None
    if cached is not None and plan.needs("question_mass"):
        mass = _question_mass(params, request, cached, active, sequence, config)
        # The pass reads stored KV that the first layer overwrites.
        hidden = once_known(active.rows.hidden, mass[0])
        active = replace(active, rows=replace(active.rows, hidden=hidden))
    signals = token_signals(request, mass)

    def at_layer(step: Callable[..., Any], state: _State, index: LayerIndex, *more: Any, **static: Any) -> Any:
        active, blended = state
        if isinstance(index, int) and not params.by_layer:
            index = once_known(index, active.rows.hidden[0, 0])
        static |= {"config": config, "nothing_cached": cached is None}
        layer = None if cached is None or in_place else stored_layer(cached, index)
        return step(params, active, layer, blended, sequence, index, *more, **static)

    later_positions, state = [], (active, cached if isinstance(cached, KVCache) and in_place else empty)
    for number, stage in enumerate(plan.stages):
        measured = number == 0 and plan.needs("cross_mass")
        with jax.named_scope(f"stage_{number}"):  # profiles tell stages apart by it
            layers = range(stage.first, stage.border - measured)
            state, _ = scan_layers(
                params, lambda state, index: (at_layer(plain_layer, state, index), None), state, layers
            )
            if measured:
                context = request.context_length
                active, blended, signals = at_layer(cross_mass_layer, state, stage.border - 1, signals, context)
                state = active, blended
            if stage is plan.stages[-1]:
                logits, next_token, blended = at_layer(last_layer, state, stage.border)
            else:
                room, choice = plan.stages[number + 1].rows, {"selector": plan.selector, "deviation": plan.deviation}
                keep = request.keep[number]
                state = at_layer(border_layer, state, stage.border, signals, keep, room=room, **choice)
                later_positions.append(state[0].rows.positions)
    return Prefilled(logits, next_token, blended, tuple(later_positions))


def _question_mass(
    params: Params,
    request: Request,
    cached: StoredCache,
    active: ActiveRows,
    sequence: PromptSequence,
    config: ModelConfig,
) -> Float[Array, " keys"]:
    """Returns the question's attention to every key, summed over layers, from a pass of the forced tokens alone."""

    def body(carry: tuple[Rows, jax.Array], index: LayerIndex) -> tuple[tuple[Rows, jax.Array], None]:
        layer = stored_layer(cached, index)
        return question_layer(params, *carry, layer, request.is_question, sequence, index, config=config), None

    start = begin_question_pass(request, active, sequence)
    return scan_layers(params, body, start, range(config.num_layers))[0][1]


def standalone(
    params: Params,
    token_ids: Int[Array, " tokens"],
    context: KVCache | None,
    start: Int[Array, ""],
    sequence: PromptSequence,
    embeddings: Float[HostOrDevice, "tokens hidden"] | None = None,
    *,
    config: ModelConfig,
) -> KVCache:
    """Returns the KV that a store keeps, `[layers, tokens, kv_heads, head_dim]`: K before RoPE, V as it is.

    This is a prefill of the context and the chunk alone, which stops once the last layer's K, V are known.

    Args:
        token_ids: the context's ids and the chunk's; with `context`, the chunk's alone.
        context: the context's own KV, as this function returns it.
        start: position of the first of the tokens: the context's length, or 0 without `context`.
        embeddings: what the first layer reads in the place of those ids that are negative.
    """
    positions = start + jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    hidden = embedder(params, config).embed(token_ids if embeddings is None else jnp.maximum(token_ids, 0))
    if embeddings is not None:
        hidden = jnp.where((token_ids < 0)[:, None], embeddings.astype(hidden.dtype), hidden)
    rows = rows_at(hidden, positions, sequence.angles)
    before_rows = None if context is None else context.with_room(sequence.num_keys)

    def body(rows: Rows, index: LayerIndex) -> tuple[Rows, LayerKV]:
        cached = None if before_rows is None else before_rows.layer(index)
        step = layer_step(params, config, index, rows, cached, sequence)
        return step.rows, step.fresh

    last = config.num_layers - 1
    rows, before = scan_layers(params, body, rows, range(last))
    k, v = (x[None] for x in layer_at(params, config, last).keys_values(rows.hidden))
    if before is None:
        return KVCache(k, v)
    return KVCache(jnp.concatenate([before.k, k]), jnp.concatenate([before.v, v]))
