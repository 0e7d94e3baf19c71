"""The resident executor: a whole prefill as one program of scans, with all cached KV on the device.

It reads like the paper: layers up to the check layer over all active tokens; there, selection; then stages of layers
over fewer and fewer HKVD tokens, and the logits of the last one. Nothing returns to the host in between.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.layer_step import (
    LayerKV,
    Sequence,
    Step,
    Survivors,
    cross_mass,
    evidence_of,
    highest,
    last_row,
    layer_step,
)
from cacheblend_jax.blend.schedule import Plan, Stage
from cacheblend_jax.blend.selectors import Evidence, Selector, get_selector
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import Params, Rows, embedder, layer_at, layer_starts, rows_at
from pallas_kernels import attention_mass


@struct.dataclass
class Request:
    """A prefill's traced half. Active tokens are those that are not exact; padding rows have `positions` = keys."""

    token_ids: Int[Array, " active"]
    positions: Int[Array, " active"]
    length: Int[Array, ""]
    forced: Bool[Array, " active"]
    chunk_starts: Int[Array, " active"]
    context_length: Int[Array, ""]
    keep: Int[Array, " borders"]  # survivors of each border but the last, forced ones included
    forced_rows: Int[Array, " forced"]  # indices into the active tokens; `active` is padding
    is_question: Bool[Array, " forced"]
    oracle: Float[Array, " active"]
    seed: Int[Array, ""]


@struct.dataclass
class Prefilled:
    """What a prefill returns: logits, the greedy next token, the blended cache, and each stage's tokens."""

    logits: Float[Array, " vocab"]
    next_token: Int[Array, ""]
    k: Float[Array, "layers keys kv_heads head_dim"]  # rotated
    v: Float[Array, "layers keys kv_heads head_dim"]
    stage_positions: tuple[Int[Array, " rows"], ...]


@struct.dataclass
class _State:
    rows: Rows
    index: Int[Array, " rows"]  # of each row, among the active tokens
    blended: LayerKV  # [layers, …], filled layer by layer


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
    hidden = embedder(params, config).embed(request.token_ids)
    # Written into a buffer of its own: one that is read and overwritten in turn would be copied whole between stages.
    empty = jnp.zeros((config.num_layers, plan.cache_length, config.num_kv_heads, config.head_dim), hidden.dtype)
    state = _State(
        rows=rows_at(hidden, request.positions, cos, sin),
        index=jnp.arange(plan.active, dtype=jnp.int32),
        blended=LayerKV(empty, empty),
    )
    shared = _shared_evidence(params, config, plan, request, cached, state, sequence)
    run = partial(_run_stage, params, config, plan, request, cached, sequence)
    stage_positions = []
    for number, stage in enumerate(plan.stages):
        stage_positions.append(state.rows.positions)
        state, shared = run(number, stage, state, shared)
    logits = embedder(params, config).logits(state.rows.hidden)[0]
    return Prefilled(
        logits, jnp.argmax(logits).astype(jnp.int32), state.blended.k, state.blended.v, tuple(stage_positions)
    )


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
    shared: Evidence,
) -> tuple[_State, Evidence]:
    """Scans a stage's layers, then takes the border's step, where the rows shrink to the next stage's."""

    def step_at(state: _State, index: jax.Array | int, narrow=None) -> tuple[_State, Step]:
        layer = None if cached is None else _layer_of(cached, index)
        step = layer_step(params, config, index, state.rows, layer, sequence, narrow)
        return replace(state, rows=step.rows, blended=_write(state.blended, step.blended, index)), step

    selector = None if cached is None or number == len(plan.stages) - 1 else _selector(plan)
    watched = number == 0 and selector is not None and "cross_mass" in selector.needs
    layers = jnp.arange(stage.first, stage.border - watched, dtype=jnp.int32)
    if layers.size:  # an empty loop would be compiled all the same
        state, _ = lax.scan(lambda state, index: (step_at(state, index)[0], None), state, layers)
    if watched:
        state, step = step_at(state, stage.border - 1)
        starts = layer_starts(config, stage.border - 1, state.rows.positions)
        mass = cross_mass(step, request.chunk_starts, request.context_length, sequence, starts)
        shared = replace(shared, cross_mass=mass)

    def choose(fresh: LayerKV) -> Survivors:
        if selector is None or cached is None:
            return last_row(state.rows, sequence)
        evidence = evidence_of(fresh, _layer_of(cached, stage.border), state.rows, shared, state.index)
        scores = selector.score(evidence)
        room = plan.stages[number + 1].rows
        return highest(scores, request.forced[state.index], evidence.valid, request.keep[number], room)

    after, step = step_at(state, stage.border, choose)
    return replace(after, index=state.index[step.kept]), shared


def _selector(plan: Plan) -> Selector | None:
    return None if plan.selector is None else get_selector(plan.selector)


def _layer_of(kv: LayerKV, index: jax.Array | int) -> LayerKV:
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, index, keepdims=False), kv)


def _write(kv: LayerKV, layer: LayerKV, index: jax.Array | int) -> LayerKV:
    return jax.tree.map(lambda stack, x: lax.dynamic_update_index_in_dim(stack, x, index, 0), kv, layer)


def _shared_evidence(
    params: Params,
    config: ModelConfig,
    plan: Plan,
    request: Request,
    cached: LayerKV | None,
    state: _State,
    sequence: Sequence,
) -> Evidence:
    """What is known of the active tokens before the first layer; the borders add their K, V."""
    zeros = jnp.zeros(plan.active, jnp.float32)
    question_mass = zeros
    selector = _selector(plan)
    if cached is not None and selector is not None and "question_mass" in selector.needs:
        mass = _question_mass(params, config, request, cached, state, sequence)
        question_mass = mass[jnp.minimum(request.positions, plan.cache_length - 1)]
    nothing = jnp.zeros((plan.active, config.num_kv_heads, config.head_dim), state.blended.k.dtype)
    return Evidence(
        valid=request.positions < plan.cache_length,
        positions=request.positions,
        chunk_starts=request.chunk_starts,
        index=state.index,
        k_fresh=nothing,
        v_fresh=nothing,
        k_cached=nothing,
        v_cached=nothing,
        cross_mass=zeros,
        question_mass=question_mass,
        oracle=request.oracle,
        seed=request.seed,
        part=plan.deviation,
    )


def _question_mass(
    params: Params, config: ModelConfig, request: Request, cached: LayerKV, state: _State, sequence: Sequence
) -> Float[Array, " keys"]:
    """Attention that the question pays to every key, summed over layers: a pass of the forced tokens over cached KV.

    The pass writes no cache: it is full KV reuse, watched.
    """
    with jax.named_scope("question_pass"):
        num_active, num_keys = request.token_ids.shape[0], sequence.cos.shape[0]
        is_row = request.forced_rows < num_active
        at = jnp.minimum(request.forced_rows, num_active - 1)
        rows = state.rows.take(at, is_row, num_keys)

        def body(carry: tuple[Rows, jax.Array], index: jax.Array) -> tuple[tuple[Rows, jax.Array], None]:
            rows, mass = carry
            step = layer_step(params, config, index, rows, _layer_of(cached, index), sequence)
            starts = layer_starts(config, index, rows.positions)
            lse = jnp.where(request.is_question[:, None], step.lse, -jnp.inf)
            mass += attention_mass(
                step.q, step.blended.k, lse, rows.positions, q_starts=starts, kv_length=sequence.length
            )
            return (step.rows, mass), None

        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        (_, mass), _ = lax.scan(body, (rows, jnp.zeros(num_keys, jnp.float32)), layers)
        return mass


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

    def body(rows: Rows, index: jax.Array) -> tuple[Rows, LayerKV]:
        step = layer_step(params, config, index, rows, None, sequence)
        return step.rows, step.fresh

    rows, kv = lax.scan(body, rows, jnp.arange(config.num_layers - 1, dtype=jnp.int32))
    last = LayerKV(*layer_at(params, config, config.num_layers - 1).keys_values(rows.hidden))
    return jax.tree.map(lambda stack, x: jnp.concatenate([stack, x[None]]), kv, last)
