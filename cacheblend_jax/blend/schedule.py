"""What is static about a prefill: the stages in which the set of recomputed tokens shrinks, and their padded sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from cacheblend_jax.blend.buckets import FINE_BUCKETS, Buckets, buckets_up_to, forced_bucket
from cacheblend_jax.errors import CacheBlendError

TAPER = 0.15  # the first stage's ratio is up to this much above the mean, the last as much below


@dataclass(frozen=True)
class BlendConfig:
    """How a blend chooses the tokens to recompute.

    Attributes:
        recompute_ratio: HKVD tokens / candidates, averaged over the layers after the check layer; in [0, 1].
        selector: name of a selector (`cacheblend_jax.blend.SELECTORS`).
        check_layer: the layer where tokens are first chosen; `None`: the model's own.
        deviation: what the KV deviation is measured on: `"kv"`, `"k"` or `"v"`.
        num_stages: groups of layers after the check layer; the set shrinks between them (gradual filtering).
        seed: of the `random` selector.
    """

    recompute_ratio: float = 0.15
    selector: str = "hkvd"
    check_layer: int | None = None
    deviation: str = "kv"
    num_stages: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        from cacheblend_jax.blend.selectors import get_selector

        ratio = self.recompute_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise CacheBlendError(f"recompute_ratio must be in [0, 1], got {ratio!r}")
        get_selector(self.selector)
        if self.deviation not in ("kv", "k", "v"):
            raise CacheBlendError(f"deviation must be 'kv', 'k' or 'v', got {self.deviation!r}")
        if not _is_integer(self.num_stages) or self.num_stages < 1:
            raise CacheBlendError(f"num_stages must be a whole number of at least 1, got {self.num_stages!r}")
        if self.check_layer is not None and (not _is_integer(self.check_layer) or self.check_layer < 1):
            raise CacheBlendError(f"check_layer must be None or a layer from 1 on, got {self.check_layer!r}")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**31:
            raise CacheBlendError(f"seed must be a whole number in [0, 2^31), got {self.seed!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _smallest_in_bucket(bucket: int) -> int:
    """Returns the smallest count that `forced_bucket` maps to `bucket`."""
    return ([0, *buckets_up_to(forced_bucket, bucket)][-2]) + 1


@dataclass(frozen=True)
class Stage:
    """Layers `first … border`, all computing the K, V of the same `rows`; at the border fewer rows go on."""

    first: int
    border: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """A prefill's static half: it names one compiled program.

    `nothing_cached` marks prefill from scratch: active tokens are all tokens, and no cached KV is read.
    """

    cache_length: int
    active: int
    stages: tuple[Stage, ...]
    forced: int = 0
    nothing_cached: bool = False
    selector: str | None = None
    deviation: str = "kv"


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
    everything = Plan(cache_length, active_rows, (Stage(0, num_layers - 1, active_rows),))
    if blend is None or forced == active or check_layer >= num_layers - 1:
        return everything
    forced_rows = forced_bucket(forced)
    most_candidates = active_rows - _smallest_in_bucket(forced_rows)
    stages = [Stage(0, check_layer, active_rows)]
    groups = layer_groups(num_layers, check_layer, blend.num_stages)
    ratios = stage_ratios(blend.recompute_ratio, [last - first + 1 for first, last in groups])
    for (first, last), ratio in zip(groups, ratios, strict=True):
        rows = _row_bucket(math.ceil(ratio * most_candidates) + forced_rows)
        stages.append(Stage(first, last, min(rows, stages[-1].rows)))
    return Plan(
        cache_length,
        active_rows,
        tuple(stages),
        forced=min(forced_rows, active_rows),
        selector=blend.selector,
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


def stage_ratios(ratio: float, group_sizes: list[int]) -> list[float]:
    """Returns a ratio for each group, falling linearly, whose mean over the layers is `ratio`; none exceeds 1.

    Source: gradual filtering, CacheBlend (arXiv 2405.16444) §4.3: the first ratio slightly above, the last below.
    """
    count = len(group_sizes)
    if count == 1 or ratio == 0:
        return [ratio] * count
    slopes = [1 - 2 * i / (count - 1) for i in range(count)]
    mean = sum(slope * size for slope, size in zip(slopes, group_sizes, strict=True)) / sum(group_sizes)
    taper = min(TAPER, (1 - ratio) / ratio / (1 - mean))
    return [min(ratio * (1 + taper * (slope - mean)), 1.0) for slope in slopes]


def survivor_counts(plan: Plan, ratio: float, candidates: int, forced: int) -> list[int]:
    """Returns how many tokens survive each border but the last: forced ones and ⌈stage ratio x candidates⌉ others."""
    if plan.selector is None:
        return []
    sizes = [stage.border - stage.first + 1 for stage in plan.stages[1:]]
    # ceil of a product that is whole but for rounding must not add a token
    counts = [math.ceil(r * candidates - 1e-9) + forced for r in stage_ratios(ratio, sizes)]
    return [min(count, stage.rows) for count, stage in zip(counts, plan.stages[1:], strict=True)]
