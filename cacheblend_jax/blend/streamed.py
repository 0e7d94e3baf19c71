"""The streamed executor: runs the steps in a Python loop, while the cached KV of later layers arrives.

Of layers that come one by one, only those in flight are on the device. The loop never reads a result; it only waits
for layers to arrive, or for room. Run over shapes, it compiles its programs: one for each number of rows, which serves
all such layers since their index is traced, and one for each border between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from cacheblend_jax.blend.layer_step import HostOrDevice, PromptSequence
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import (
    ActiveRows,
    Prefilled,
    Request,
    begin,
    begin_question_pass,
    begin_rows,
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
from cacheblend_jax.model.quantised_kv import StoredLayer, stored_layer


@runtime_checkable
class LayerSource(Protocol):
    """Where layers of cached KV come from, such as `engine.layer_stream.LayerStream`."""

    def next(self) -> StoredLayer | None:
        """Waits for the next layer's KV; `None` where nothing is stored, or it is in the cache: see `placed`."""

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache, which it may donate, with the layer's KV in place, where `next` returned `None`."""

    def used_until(self, result: jax.Array) -> None:
        """Declares that the step which computes `result` reads it, and that nothing later does."""


class ShapeSource:
    """Stands in for a stream while the loop runs over shapes: every layer is `layer`, a shape."""

    def __init__(self, layer: StoredLayer) -> None:
        self._layer = layer

    def next(self) -> StoredLayer:
        """Returns the shape."""
        return self._layer

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache: no layer is placed into it."""
        return blended

    def used_until(self, result: Any) -> None:
        """Does nothing: shapes take no memory."""


def layers_wanted(plan: Plan, num_layers: int) -> list[int]:
    """Returns the layers whose cached KV a streamed prefill takes, in order.

    The `query` selector's question pass takes all of them before the first layer. Those that come one by one then come
    to the device twice, since keeping them there would mean holding all cached KV; in host memory they are kept. What
    comes in pages is placed into the blended cache for the pass, and is there for the blend.
    """
    return list(range(num_layers)) * (2 if plan.needs("question_mass") else 1)


def first_layer_read(plan: Plan, request: Request, num_exact: int) -> int:
    """Returns the first layer that reads stored KV of other than exact tokens.

    That is the check layer if all but exact tokens are active: the layers before it compute all of their KV. Where
    nothing is selected, or a pass of the question reads all layers, it is the first.

    Args:
        request: on the host.
        num_exact: the exact tokens.
    """
    if plan.selector is None or plan.needs("question_mass"):
        return 0
    num_active = np.count_nonzero(np.asarray(request.positions) < plan.cache_length)
    return plan.stages[0].border if num_active + num_exact == int(request.length) else 0


def prefill_streamed(
    run: Callable[..., Any],
    params: Params,
    request: Request,
    keep: Sequence[HostOrDevice],
    sequence: PromptSequence,
    stream: LayerSource,
    indices: Sequence[HostOrDevice],
    *,
    config: ModelConfig,
    plan: Plan,
    placing: bool,
    stored: KVCache | None = None,
) -> Prefilled:
    """Runs a planned prefill whose cached KV arrives through `stream`, in the order of `layers_wanted`.

    Args:
        run: `run(function, *arrays, **static)` runs a step as a program (`runtime.programs.Runner`).
        request: on the device, as `sequence` is. No step may bring the device a number from the host: it would go there
            behind the layers on their way, and the step would wait for all of them.
        keep: the request's `keep`, int32, each by itself.
        indices: the layers' numbers, int32, each by itself.
        placing: whether a layer's stored values are placed into the blended cache by a program of their own, where the
            platform blends in place: then layers that come in pages are computed by the same programs. Else a step's
            program places its layer's.
        stored: all stored KV, where it is on the device already: it becomes the blended cache, layer by layer, and
            `stream` has layers for a question pass alone, `None` in the others' places.

    Returns what the resident executor does, to float tolerance.

    Raises:
        LostChunkError: a chunk's KV could not be read; nothing is left running.
    """
    step = partial(run, config=config)
    over = partial(step, donate=("blended",), nothing_cached=plan.nothing_cached)
    if stored is None:
        active, blended = step(begin, params, request, sequence)
    else:
        active, blended = step(begin_rows, params, request, sequence), stored
    mass = None
    if plan.needs("question_mass"):
        mass, blended = _question_mass(run, params, request, active, blended, sequence, stream, indices, config)
    signals = run(token_signals, request, mass)
    later_positions = []

    def at(layer: int) -> tuple[Any, ...]:
        """Takes the next layer's KV; returns what its step takes first."""
        cached, into = stream.next(), blended
        if cached is None:
            into = stream.placed(into)
        elif placing and isinstance(cached, LayerKV):
            into, cached = run(place_layer, into, cached, indices[layer], donate=("blended",)), None
        return params.only_layer(layer), active, cached, into, sequence, indices[layer]

    for number, stage in enumerate(plan.stages):
        for layer in range(stage.first, stage.border):
            if number == 0 and layer == stage.border - 1 and plan.needs("cross_mass"):
                active, blended, signals = over(cross_mass_layer, *at(layer), signals, request.context_length)
            else:
                active, blended = over(plain_layer, *at(layer))
            stream.used_until(active.rows.hidden)
        at_border = at(stage.border)
        if stage is plan.stages[-1]:
            logits, next_token, blended = over(last_layer, *at_border)
            stream.used_until(next_token)
        else:
            room, choice = plan.stages[number + 1].rows, {"selector": plan.selector, "deviation": plan.deviation}
            active, blended = over(border_layer, *at_border, signals, keep[number], room=room, **choice)
            stream.used_until(active.rows.hidden)
            later_positions.append(active.rows.positions)
    return Prefilled(logits, next_token, blended, tuple(later_positions))


def place_layer(blended: KVCache, cached: LayerKV, index: Int[Array, ""]) -> KVCache:
    """Returns the cache with a layer's stored KV in it (traceable)."""
    return blended.with_layer(index, cached)


def _question_mass(
    run: Callable[..., Any],
    params: Params,
    request: Request,
    active: ActiveRows,
    blended: KVCache,
    sequence: PromptSequence,
    stream: LayerSource,
    indices: Sequence[HostOrDevice],
    config: ModelConfig,
) -> tuple[Float[Array, " keys"] | jax.ShapeDtypeStruct, KVCache]:
    """Returns the question's attention to every key, and the cache with what the stream has placed there."""
    rows, mass = run(begin_question_pass, request, active, sequence)
    for layer in range(config.num_layers):
        cached = stream.next()
        if cached is None:
            blended = stream.placed(blended)
            cached = run(stored_layer, blended, indices[layer])
        rows, mass = run(
            question_layer,
            params.only_layer(layer),
            rows,
            mass,
            cached,
            request.is_question,
            sequence,
            indices[layer],
            config=config,
        )
        stream.used_until(mass)
    return mass, blended
