"""The streamed executor: the resident's steps in a Python loop, each layer's cached KV arriving while others compute.

Of the cached KV, only the layers on their way are ever on the device. The loop never reads a result: it waits for
layers to arrive, and nothing else. Programs are few: one for each number of rows, reused over layers by their traced
index, and one for each border between stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from cacheblend_jax.blend.layer_step import LayerKV, Sequence
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
from cacheblend_jax.model.transformer import Params, Rows

Placement = jax.sharding.Sharding | None


class Arriving(Protocol):
    """Where layers of cached KV come from (`blend.loading.LayerStream`)."""

    def next(self) -> LayerKV:
        """Waits for the next layer's."""

    def used_until(self, result: jax.Array) -> None:
        """Says that it is read by the step which computes `result`, and by nothing later."""


# The programs. With a `placement` (of a mesh) results are put there, where the next program expects them.


def _begin(
    params: Params, request: Request, sequence: Sequence, *, config: ModelConfig, placement: Placement
) -> tuple[Current, LayerKV]:
    return _placed(begin(params, config, request, sequence), placement)


def _begin_question(
    request: Request, current: Current, sequence: Sequence, *, placement: Placement
) -> tuple[Rows, Float[Array, " keys"]]:
    return _placed(begin_question_pass(request, current, sequence), placement)


def _question(
    params: Params,
    rows: Rows,
    mass: Float[Array, " keys"],
    cached: LayerKV,
    is_question: jax.Array,
    sequence: Sequence,
    index: Int[Array, ""],
    *,
    config: ModelConfig,
    placement: Placement,
) -> tuple[Rows, Float[Array, " keys"]]:
    return _placed(question_step(params, config, index, rows, mass, cached, is_question, sequence), placement)


def _know(request: Request, mass: Float[Array, " keys"] | None, *, placement: Placement) -> Known:
    return _placed(known_of(request, mass), placement)


def _layer(
    params: Params,
    current: Current,
    cached: LayerKV,
    blended: LayerKV,
    sequence: Sequence,
    index: Int[Array, ""],
    *,
    config: ModelConfig,
    placement: Placement,
) -> tuple[Current, LayerKV]:
    return _placed(advance(params, config, index, current, cached, blended, sequence)[:2], placement)


def _watched_layer(
    params: Params,
    current: Current,
    cached: LayerKV,
    blended: LayerKV,
    sequence: Sequence,
    index: Int[Array, ""],
    known: Known,
    context_length: Int[Array, ""],
    *,
    config: ModelConfig,
    placement: Placement,
) -> tuple[Current, LayerKV, Known]:
    after, blended, step = advance(params, config, index, current, cached, blended, sequence)
    mass = cross_mass_of(config, index, step, current.rows.positions, known, context_length, sequence)
    return _placed((after, blended, replace(known, cross_mass=mass)), placement)


def _border(
    params: Params,
    current: Current,
    cached: LayerKV,
    blended: LayerKV,
    sequence: Sequence,
    index: Int[Array, ""],
    known: Known,
    keep: Int[Array, ""],
    *,
    config: ModelConfig,
    room: int,
    selector: str,
    deviation: str,
    placement: Placement,
) -> tuple[Current, LayerKV]:
    narrow = to_survivors(current, cached, known, keep, room=room, selector=selector, deviation=deviation)
    return _placed(advance(params, config, index, current, cached, blended, sequence, narrow)[:2], placement)


def _last_layer(
    params: Params,
    current: Current,
    cached: LayerKV,
    blended: LayerKV,
    sequence: Sequence,
    index: Int[Array, ""],
    *,
    config: ModelConfig,
    placement: Placement,
) -> tuple[Float[Array, " vocab"], Int[Array, ""], LayerKV]:
    narrow = to_last_row(current, sequence)
    current, blended, _ = advance(params, config, index, current, cached, blended, sequence, narrow)
    return _placed((*logits_of(params, config, current.rows), blended), placement)


def _placed(tree: Any, placement: Placement) -> Any:
    return tree if placement is None else lax.with_sharding_constraint(tree, placement)


BLENDED = 3  # the argument of every layer's program that is written in place


@dataclass(frozen=True)
class Programs:
    """A plan's compiled programs. `layers` holds each stage's, `borders` that of each border but the last."""

    begin: Any
    know: Any
    layers: list[Any]
    borders: list[Any]
    last: Any
    watched: Any = None
    begin_question: Any = None
    question: Any = None


def make_programs(
    compiled: Callable[..., Any],
    params: Params,
    request: Request,
    *,
    config: ModelConfig,
    plan: Plan,
    placement: jax.sharding.Sharding,
) -> Programs:
    """Gets a plan's programs.

    Args:
        compiled: `compiled(function, arguments, donate=…, **static)` returns a compiled function (`ProgramCache.get`).
        request: shapes and dtypes of the plan's requests.
    """
    on_mesh = isinstance(placement, jax.sharding.NamedSharding)
    shapes = _Shapes(config, plan, request, placement)
    common = {"placement": placement if on_mesh else None}
    model = common | {"config": config}
    keys, active, sequence, index = plan.cache_length, plan.active, shapes.sequence, shapes.scalar
    as_planned = {"shapes": (keys, active, plan.forced, len(plan.stages))}

    def at_layer(rows: int) -> tuple[Any, ...]:
        return params, shapes.current(rows), shapes.layer, shapes.stack, sequence, index

    def get(function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], **static: Any) -> Any:
        donate = (BLENDED,) if function in (_layer, _watched_layer, _border, _last_layer) else ()
        return compiled(function, arguments, donate=donate, **static)

    def layers_of(stage: Stage) -> Any:
        if stage.border == stage.first:
            return None
        return get(_layer, lambda: at_layer(stage.rows), num_rows=stage.rows, keys=keys, **model)

    def border_of(stage: Stage, after: Stage) -> Any:
        chosen = {"selector": plan.selector, "deviation": plan.deviation, "room": after.rows, "active": active}
        arguments = (*at_layer(stage.rows), shapes.known, index)
        return get(_border, lambda: arguments, num_rows=stage.rows, keys=keys, **chosen, **model)

    last_rows = plan.stages[-1].rows
    mass = shapes.mass if needs(plan.selector, "question_mass") else None
    asked: dict[str, Any] = {}
    if needs(plan.selector, "cross_mass"):
        watched = (*at_layer(active), shapes.known, index)
        asked["watched"] = get(_watched_layer, lambda: watched, num_rows=active, keys=keys, **model)
    if mass is not None:
        forced = shapes.rows(plan.forced)
        start = (shapes.request, shapes.current(active), sequence)
        step = (params, forced, mass, shapes.layer, shapes.request.is_question, sequence, index)
        asked["begin_question"] = get(_begin_question, lambda: start, **as_planned, **common)
        asked["question"] = get(_question, lambda: step, num_rows=plan.forced, keys=keys, **model)
    return Programs(
        begin=get(_begin, lambda: (params, shapes.request, sequence), **as_planned, **model),
        know=get(_know, lambda: (shapes.request, mass), asked=mass is not None, **as_planned, **common),
        layers=[layers_of(stage) for stage in plan.stages],
        borders=[border_of(stage, after) for stage, after in pairwise(plan.stages)],
        last=get(_last_layer, lambda: at_layer(last_rows), num_rows=last_rows, keys=keys, **model),
        **asked,
    )


class _Shapes:
    """Shapes and dtypes of what passes between the programs."""

    def __init__(self, config: ModelConfig, plan: Plan, request: Request, placement: jax.sharding.Sharding) -> None:
        self._placement = placement
        self._hidden = (config.hidden_size, jnp.dtype(config.dtype))
        self._half, self._active = config.head_dim // 2, plan.active
        kv = (plan.cache_length, config.num_kv_heads, config.head_dim)
        layer, stack = (self._array(shape, config.dtype) for shape in (kv, (config.num_layers, *kv)))
        self.layer, self.stack = LayerKV(layer, layer), LayerKV(stack, stack)
        self.scalar = jax.ShapeDtypeStruct((), jnp.int32)
        self.request = jax.tree.map(lambda leaf: self._array(leaf.shape, leaf.dtype), request)
        table = self._array((plan.cache_length, self._half), jnp.float32)
        self.sequence = Sequence(self.request.length, table, table)
        self.mass = self._array((plan.cache_length,), jnp.float32)
        abstract = jax.eval_shape(lambda request: known_of(request, None), self.request)
        self.known = jax.tree.map(lambda leaf: self._array(leaf.shape, leaf.dtype), abstract)

    def rows(self, rows: int) -> Rows:
        """So many rows."""
        hidden, dtype = self._hidden
        table = self._array((rows, self._half), jnp.float32)
        return Rows(self._array((rows, hidden), dtype), self._array((rows,), jnp.int32), table, table)

    def current(self, rows: int) -> Current:
        """So many rows, and their places."""
        return Current(self.rows(rows), self._array((rows,), jnp.int32))

    def _array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._placement)


def layers_wanted(plan: Plan, num_layers: int) -> list[int]:
    """Returns the layers whose cached KV a streamed prefill takes, in order.

    The `query` selector's pass of the question needs all of them before the first layer: they are loaded twice, since
    keeping them would mean all cached KV on the device.
    """
    passes = 2 if needs(plan.selector, "question_mass") else 1
    return list(range(num_layers)) * passes


def prefill_streamed(
    programs: Programs,
    params: Params,
    request: Request,
    stream: Arriving,
    sequence: Sequence,
    *,
    plan: Plan,
    keep: np.ndarray,
) -> Prefilled:
    """Runs a planned prefill whose cached KV arrives by `stream`, in the order of `layers_wanted`.

    `request` and `sequence` are on the device; `keep`, int32 `[borders]`, is the request's on the host. Returns what
    the resident executor does, to float tolerance.

    Raises:
        LostChunkError: a chunk's KV could not be read; nothing is left running.
    """
    current, blended = programs.begin(params, request, sequence)
    mass = None
    if programs.question is not None:
        mass = _question_pass(programs, params, request, stream, current, sequence, plan)
    known = programs.know(request, mass)
    stage_positions = []
    for number, stage in enumerate(plan.stages):
        stage_positions.append(current.rows.positions)
        for layer in range(stage.first, stage.border):
            at = (current, stream.next(), blended, sequence, np.int32(layer))
            if number == 0 and layer == stage.border - 1 and programs.watched is not None:
                current, blended, known = programs.watched(params, *at, known, request.context_length)
            else:
                current, blended = programs.layers[number](params, *at)
            stream.used_until(current.rows.hidden)
        at = (current, stream.next(), blended, sequence, np.int32(stage.border))
        if stage is plan.stages[-1]:
            logits, next_token, blended = programs.last(params, *at)
            stream.used_until(next_token)
        else:
            current, blended = programs.borders[number](params, *at, known, keep[number])
            stream.used_until(current.rows.hidden)
    return Prefilled(logits, next_token, blended.k, blended.v, tuple(stage_positions))


def _question_pass(
    programs: Programs,
    params: Params,
    request: Request,
    stream: Arriving,
    current: Current,
    sequence: Sequence,
    plan: Plan,
) -> Float[Array, " keys"]:
    rows, mass = programs.begin_question(request, current, sequence)
    for layer in range(plan.stages[-1].border + 1):
        cached = stream.next()
        rows, mass = programs.question(params, rows, mass, cached, request.is_question, sequence, np.int32(layer))
        stream.used_until(mass)
    return mass
