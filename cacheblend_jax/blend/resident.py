"""The resident executor: a whole prefill as one program of scans, with all cached KV on the device.

It reads like the paper: layers up to the check layer over all active tokens; there, selection; then stages of layers
over fewer and fewer HKVD tokens, and the logits of the last one. Nothing returns to the host in between.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cacheblend_jax.blend.layer_step import LayerKV, Sequence, Step, layer_step
from cacheblend_jax.blend.schedule import Plan, Stage
from cacheblend_jax.blend.steps import (
    Current,
    Known,
    Prefilled,
    Request,
    advance,
    begin,
    begin_question_pass,
    cross_mass_of,
    known_of,
    logits_of,
    needs,
    question_step,
    to_last_row,
    to_survivors,
)
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import Params, Rows, embedder, layer_at, rows_at, scan_layers
from pallas_kernels.dispatch import current_target

_State = tuple[Current, LayerKV]  # the rows, and the blended cache, filled layer by layer


def prefill(
    params: Params,
    request: Request,
    cached: LayerKV | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: ModelConfig,
    plan: Plan,
) -> Prefilled:
    """Runs a planned prefill (traceable; `config` and `plan` are static).

    Args:
        cached: stored K (before RoPE) and V of all layers, `[layers, keys, kv_heads, head_dim]`, zeros where nothing
            is stored; only read. `None` for a plan with `nothing_cached`.
        cos: float32 `[keys, head_dim // 2]`, as `rope_tables` gives them, and `sin` alike.
    """
    sequence = Sequence(request.length, cos, sin)
    state = begin(params, config, request, sequence)
    mass = None
    if cached is not None and needs(plan.selector, "question_mass"):
        mass = _question_mass(params, config, request, cached, state[0], sequence)
    known = known_of(request, mass)
    run = partial(_run_stage, params, config, plan, request, cached, sequence)
    stage_positions = []
    for number, stage in enumerate(plan.stages):
        stage_positions.append(state[0].rows.positions)
        with jax.named_scope(f"stage_{number}"):  # profiles tell stages apart by it
            state, known = run(number, stage, state, known)
    current, blended = state
    logits, next_token = logits_of(params, config, current.rows)
    return Prefilled(logits, next_token, blended.k, blended.v, tuple(stage_positions))


def _run_stage(
    params: Params,
    config: ModelConfig,
    plan: Plan,
    request: Request,
    cached: LayerKV | None,
    sequence: Sequence,
    number: int,
    stage: Stage,
    state: _State,
    known: Known,
) -> tuple[_State, Known]:
    """Scans a stage's layers, then takes the border's step, where the rows shrink to the next stage's."""

    def step_at(state: _State, index: jax.Array | int, narrow=None) -> tuple[_State, Step]:
        index = _when_reached(index, state)
        layer = None if cached is None else _layer_of(cached, index)
        current, blended, step = advance(params, config, index, state[0], layer, state[1], sequence, narrow)
        return (current, blended), step

    selector = None if cached is None or number == len(plan.stages) - 1 else plan.selector
    watched = number == 0 and needs(selector, "cross_mass")
    layers = range(stage.first, stage.border - watched)
    state, _ = scan_layers(lambda state, index: (step_at(state, index)[0], None), state, layers)
    if watched:
        positions = state[0].rows.positions
        state, step = step_at(state, stage.border - 1)
        mass = cross_mass_of(config, stage.border - 1, step, positions, known, request.context_length, sequence)
        known = replace(known, cross_mass=mass)
    if selector is None or cached is None:
        narrow = to_last_row(state[0], sequence)
    else:
        room, layer = plan.stages[number + 1].rows, _layer_of(cached, _when_reached(stage.border, state))
        keep = request.keep[number]
        narrow = to_survivors(state[0], layer, known, keep, room=room, selector=selector, deviation=plan.deviation)
    return step_at(state, stage.border, narrow)[0], known


def _when_reached(index: jax.Array | int, state: _State) -> jax.Array | int:
    """Returns a layer's index, which a CPU's program is to know only once the layer before is done.

    XLA for CPUs begins with what depends on nothing: it would take all layers of constant index (those at borders) out
    of their stacks at the start, and hold these copies of weights and cached KV until they are read.
    """
    if not isinstance(index, int) or current_target().platform != "cpu":
        return index
    return jnp.where(state[0].rows.hidden[0, 0] > jnp.inf, 0, index)  # never; but XLA cannot know


def _layer_of(kv: LayerKV, index: jax.Array | int) -> LayerKV:
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, index, keepdims=False), kv)


def _question_mass(
    params: Params, config: ModelConfig, request: Request, cached: LayerKV, current: Current, sequence: Sequence
) -> Float[Array, " keys"]:
    """Attention that the question pays to every key, summed over layers: a pass of the forced tokens over cached KV."""

    def body(carry: tuple[Rows, jax.Array], index: jax.Array | int) -> tuple[tuple[Rows, jax.Array], None]:
        layer = _layer_of(cached, index)
        return question_step(params, config, index, *carry, layer, request.is_question, sequence), None

    start = begin_question_pass(request, current, sequence)
    return scan_layers(body, start, range(config.num_layers))[0][1]


def standalone(
    params: Params,
    token_ids: Int[Array, " tokens"],
    length: Int[Array, ""],
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: ModelConfig,
) -> LayerKV:
    """Returns the KV that a store keeps, `[layers, tokens, kv_heads, head_dim]`: K before RoPE, V as it is.

    A prefill of the context and the chunk alone that stops where the last layer's K, V are known.
    """
    sequence = Sequence(length, cos, sin)
    positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    rows = rows_at(embedder(params, config).embed(token_ids), positions, cos, sin)

    def body(rows: Rows, index: jax.Array | int) -> tuple[Rows, LayerKV]:
        step = layer_step(params, config, index, rows, None, sequence)
        return step.rows, step.fresh

    rows, kv = scan_layers(body, rows, range(config.num_layers - 1))
    last = LayerKV(*layer_at(params, config, config.num_layers - 1).keys_values(rows.hidden))
    last = jax.tree.map(lambda x: x[None], last)
    return last if kv is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), kv, last)
