"""Pauses of a long prefill, between two layers: the answers that run go on meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import jax

from cacheblend_jax.blend.flops import layer_flops
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.streamed import LayerSource
from cacheblend_jax.engine.delays import ComputeModel, layer_sizes
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.quantised_kv import StoredLayer
from cacheblend_jax.runtime.trace import PAUSE, Trace

LONGEST_S = 0.1  # that a prefill keeps others waiting at a time, unless a single layer takes longer
BEARABLE = 5  # times as long: what a prefill may take without pauses, while those are being compiled
RUNS = 8  # the last ones, that speed is taken from
DOUBT = 4  # a quick estimate has been this much too small
Span = tuple[float, float]  # when something began and ended, by `time.perf_counter`


class PausingLayers:
    """Hands layers on, waits for each one's step, and pauses where the next step would make it `LONGEST_S`.

    Args:
        layers: where they come from.
        count: how many are taken: after the last one there is no pause.
        between: called at each pause; what it raises ends the prefill.
        trace: records the pauses.

    Attributes:
        pauses: when they were.
    """

    def __init__(
        self, layers: LayerSource, count: int, between: Callable[[], object], trace: Trace | None = None
    ) -> None:
        self._layers, self._left, self._between, self._trace = layers, count, between, trace
        self._resumed = self._layer_began = time.perf_counter()
        self.pauses: list[Span] = []

    def next(self) -> StoredLayer | None:
        """Waits for the next layer's KV."""
        return self._layers.next()

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache with the layer's KV in place."""
        return self._layers.placed(blended)

    def used_until(self, result: jax.Array) -> None:
        """Waits for the step that computes `result`, the last one to read the layer taken last; perhaps pauses."""
        self._layers.used_until(result)
        jax.block_until_ready(result)
        self._left -= 1
        now = time.perf_counter()
        layer_s, since = now - self._layer_began, now - self._resumed
        self._layer_began = now
        if self._left and since + layer_s > LONGEST_S:
            self._between()
            self._resumed = self._layer_began = time.perf_counter()
            self.pauses.append((now, self._resumed))
            if self._trace is not None:
                self._trace.add(PAUSE, "others go on", -1, now, self._resumed)


def stretches(began: float, ended: float, pauses: Iterable[Span]) -> Iterator[Span]:
    """Yields what is left of a time without its pauses."""
    for paused, resumed in pauses:
        yield began, paused
        began = resumed
    yield began, ended


def total_s(spans: Iterable[Span]) -> float:
    """Returns the seconds of all."""
    return sum(ended - began for began, ended in spans)


@dataclass
class Speed:
    """How fast prefills were, to tell how long one would take; the fastest of the last ones, which nothing held up."""

    config: ModelConfig
    _s_per_flop: deque[float] = field(default_factory=lambda: deque(maxlen=RUNS))

    def took(self, plan: Plan, seconds: float) -> None:
        """Takes note of a prefill's seconds, without its pauses and those of waiting in which it computed nothing."""
        self._s_per_flop.append(seconds / plan_flops(self.config, plan))

    def seconds(self, plan: Plan) -> float:
        """Returns how long a plan would take; 0 before the first prefill."""
        return min(self._s_per_flop, default=0.0) * plan_flops(self.config, plan)

    def is_long(self, plan: Plan) -> bool:
        """Returns whether a plan would take longer than `LONGEST_S`: then it pauses, if others wait."""
        return self.seconds(plan) > LONGEST_S

    def is_bearable(self, plan: Plan) -> bool:
        """Returns whether others can wait for a plan that is long, rather than it for the compiler."""
        return self.seconds(plan) <= BEARABLE * LONGEST_S


class Remembered:
    """A callback that remembers what it raised, so that this is not taken for a failure of what called it.

    Attributes:
        raised: what it raised last.
    """

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback
        self.raised: BaseException | None = None

    def __call__(self) -> None:
        """Calls back."""
        try:
            self._callback()
        except BaseException as error:
            self.raised = error
            raise


def may_be_long(plan: Plan, compute: ComputeModel) -> bool:
    """Returns whether a plan may take longer than `LONGEST_S`, by an estimate."""
    return sum(compute.layer_seconds(plan) + compute.question_seconds(plan)) > LONGEST_S / DOUBT


def plan_flops(config: ModelConfig, plan: Plan) -> float:
    """Returns the FLOPs of a plan's rows, padding included, where each sees half of the keys."""
    of = layer_flops(config)
    flops = sum(
        projected * of.projected + attending * of.attending + 2 * visible * of.visible
        for _, _, projected, attending, visible in layer_sizes(plan)
    )
    if plan.needs("question_mass"):
        question = plan.forced * (of.projected + of.attending + 3 * plan.cache_length * of.visible)
        flops += question * config.num_layers
    return flops
