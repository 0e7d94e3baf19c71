"""What is static about a prefill: the stages in which the set of recomputed tokens shrinks, and their padded sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import numpy as np

from cacheblend_jax.blend.buckets import FINE_BUCKETS, Buckets, buckets_up_to, small_bucket
from cacheblend_jax.blend.config import BlendConfig
from cacheblend_jax.blend.selectors import Selector, selector_of

TAPER = 0.15  # the first stage's ratio is up to this share above the mean, the last as much below


def _smallest_in_bucket(bucket: int) -> int:
    """Returns the smallest count that `small_bucket` maps to `bucket`."""
    return ([0, *buckets_up_to(small_bucket, bucket)][-2]) + 1


@dataclass(frozen=True)
class Stage:
    """Layers `first … border`, all computing the K, V of the same `rows`; at the border fewer rows go on."""

    first: int
    border: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """A prefill's static half: what its programs are compiled for.

    Attributes:
        cache_length: keys of the blended cache, padding included.
        active: rows for the active tokens, padding included.
        stages: groups of layers, with the rows that each computes.
        forced: rows for the forced tokens among the active ones, padding included.
        nothing_cached: prefill from scratch: all tokens are active, and no cached KV is read.
        selector: `None` where no tokens are chosen.
        deviation: see `BlendConfig`.
    """

    cache_length: int
    active: int
    stages: tuple[Stage, ...]
    forced: int = 0
    nothing_cached: bool = False
    selector: Selector | None = None
    deviation: str = "kv"

    def needs(self, evidence: str) -> bool:
        """Returns whether the plan's selector reads this kind of costly evidence."""
        return self.selector is not None and evidence in self.selector.needs


def make_plan(
    *,
    num_layers: int,
    length: int,
    active: int,
    forced: int,
    blend: BlendConfig | None,
    check_layer: int,
    buckets: Buckets = FINE_BUCKETS,
) -> Plan:
    """Plans a prefill of `length` tokens, `active` of them computed, `forced` of these at every layer.

    Without candidates (`forced == active`) or with `blend=None` all active tokens are computed at every layer.
    """
    cache_length, active_rows = buckets.length(length), buckets.active(active)
    single_stage = Plan(cache_length, active_rows, (Stage(0, num_layers - 1, active_rows),))
    if blend is None or forced == active or check_layer >= num_layers - 1:
        return single_stage
    forced_rows = small_bucket(forced)
    most_candidates = active_rows - _smallest_in_bucket(forced_rows)
    stages = [Stage(0, check_layer, active_rows)]
    groups = layer_groups(num_layers, check_layer, blend.num_stages)
    ratios = stage_ratios(blend.ratio, [last - first + 1 for first, last in groups])
    for (first, last), ratio in zip(groups, ratios, strict=True):
        rows = _row_bucket(math.ceil(ratio * most_candidates) + forced_rows)
        stages.append(Stage(first, last, min(rows, stages[-1].rows)))
    return Plan(
        cache_length,
        active_rows,
        tuple(stages),
        forced=min(forced_rows, active_rows),
        selector=selector_of(blend.selector),
        deviation=blend.deviation,
    )


def full_plan(num_layers: int, length: int, buckets: Buckets = FINE_BUCKETS) -> Plan:
    """Plans full prefill of `length` tokens."""
    rows = buckets.length(length)
    return Plan(rows, rows, (Stage(0, num_layers - 1, rows),), nothing_cached=True)


def _row_bucket(rows: int) -> int:
    return -(-rows // 16) * 16


def layer_groups(num_layers: int, check_layer: int, num_stages: int) -> list[tuple[int, int]]:
    """Splits the layers after the check layer into at most `num_stages` groups of nearly equal size."""
    later = num_layers - 1 - check_layer
    count = min(num_stages, later)
    edges = [check_layer + 1 + later * i // count for i in range(count + 1)]
    return [(first, after - 1) for first, after in pairwise(edges)]


def stage_ratios(ratio: float, group_sizes: list[int], taper: float = TAPER) -> list[float]:
    """Returns a ratio for each group, falling linearly, whose mean over the layers is `ratio`; none exceeds 1.

    `taper`: the first is up to this share above the mean, the last as much below.

    Source: gradual filtering, CacheBlend (arXiv 2405.16444) §4.3: the first ratio slightly above, the last below.
    """
    count = len(group_sizes)
    if count == 1 or ratio == 0:
        return [ratio] * count
    slopes = [1 - 2 * i / (count - 1) for i in range(count)]
    mean = sum(slope * size for slope, size in zip(slopes, group_sizes, strict=True)) / sum(group_sizes)
    taper = min(taper, (1 - ratio) / ratio / (1 - mean))
    return [min(ratio * (1 + taper * (slope - mean)), 1.0) for slope in slopes]


def num_chosen(ratio: float, candidates: int) -> int:
    """Returns ⌈ratio x candidates⌉; where rounding alone keeps the product from being whole, no token is added."""
    return math.ceil(ratio * candidates - 1e-9)


def survivor_counts(plan: Plan, ratio: float, candidates: int, forced: int) -> list[int]:
    """Returns how many tokens survive each border but the last: forced ones and ⌈stage ratio x candidates⌉ others."""
    if plan.selector is None:
        return []
    sizes = [stage.border - stage.first + 1 for stage in plan.stages[1:]]
    counts = [num_chosen(r, candidates) + forced for r in stage_ratios(ratio, sizes)]
    return [min(count, stage.rows) for count, stage in zip(counts, plan.stages[1:], strict=True)]


def computed_positions(plan: Plan, first: np.ndarray, later: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns, for each layer, the positions whose K, V it computed.

    Args:
        first: of the first stage's tokens, padded.
        later: of each later stage's.
    """
    computed = []
    for stage, padded in zip(plan.stages, (first, *later), strict=True):
        positions = np.asarray(padded)
        positions = positions[positions < plan.cache_length]
        computed += [positions] * (stage.border - stage.first + 1)
    return computed
