"""The loading controller: from the delays of loading and of recomputing to a recompute ratio, or to a storage tier.

Recomputing r of a layer's tokens may take as long as loading the next layer's KV: then it costs nothing. So the ratio
is as high as loading hides, and never below what quality asks for (CacheBlend, arXiv 2405.16444, §5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from cacheblend_jax.blend.schedule import BlendConfig, Plan
from cacheblend_jax.engine.loading import READERS
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store import is_slow

# Ratios to choose among: each is a set of compiled programs, so they are few.
LADDER = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
WORTH_IT = 0.95  # stored chunks are recomputed where that saves more than the estimates may err


@dataclass(frozen=True)
class ComputeModel:
    """Seconds of a layer step, linear in the sizes that it is compiled for; and of all else in a request.

    Attributes:
        layer_s: each layer's own.
        key_s: for each key of the cache, which is rotated, written and read.
        projected_s: for each row whose K, V are computed.
        attending_s: for each row that goes on: queries, output projection, MLP.
        visible_s: for each pair of a row that goes on and a key that it sees.
        request_s: once a request.
    """

    layer_s: float
    key_s: float
    projected_s: float
    attending_s: float
    visible_s: float
    request_s: float = 0.0

    def layer_seconds(self, plan: Plan) -> list[float]:
        """T_recompute of each layer of a plan."""
        coefficients = (self.layer_s, self.key_s, self.projected_s, self.attending_s, self.visible_s)
        return [sum(c * x for c, x in zip(coefficients, sizes, strict=True)) for sizes in layer_sizes(plan)]


def layer_sizes(plan: Plan) -> list[tuple[float, float, float, float, float]]:
    """Returns what each layer's time is linear in: 1, keys, rows computed, rows that go on, and pairs they see.

    Rows stand all over the prompt: each sees half of the keys in the mean.
    """
    sizes: list[tuple[float, float, float, float, float]] = []
    for stage, after in pairwise((*plan.stages, None)):
        assert stage is not None
        for layer in range(stage.first, stage.border + 1):
            attending = stage.rows if layer < stage.border else 1 if after is None else after.rows
            sizes.append((1.0, plan.cache_length, stage.rows, attending, attending * plan.cache_length / 2))
    return sizes


@dataclass(frozen=True)
class Tier:
    """Where KV is kept: its throughput in bytes/s, a read's latency in seconds, and its price per GB and month.

    Raises:
        CacheBlendError: a throughput that is not positive and finite, a negative latency or price.
    """

    name: str
    bytes_per_s: float
    latency_s: float = 0.0
    price_per_gb_month: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_s < float("inf"):
            raise CacheBlendError(
                f"tier {self.name!r}: bytes_per_s must be positive and finite, got {self.bytes_per_s!r}"
            )
        if not 0 <= self.latency_s < float("inf"):
            raise CacheBlendError(f"tier {self.name!r}: latency_s must be at least 0, got {self.latency_s!r}")
        if self.price_per_gb_month is not None and not 0 <= self.price_per_gb_month < float("inf"):
            raise CacheBlendError(
                f"tier {self.name!r}: price_per_gb_month must be at least 0, got {self.price_per_gb_month!r}"
            )

    def load_s(self, num_bytes: float, reads: int = 1) -> float:
        """T_load: seconds that so many bytes take in so many reads, several of them at a time."""
        return num_bytes / self.bytes_per_s + self.latency_s * -(-reads // READERS)


def pipeline_s(load: float, transfer: float, compute: Sequence[float], host_layers: int, device_layers: int) -> float:
    """Returns the seconds until the last layer is computed where each layer takes `load` to read, then `transfer`.

    A layer is read when the one `host_layers` before it is done, and transferred when the one `device_layers` before
    it is: the streamed executor's own order.
    """
    read_at = transferred_at = 0.0
    done: list[float] = []
    for layer, seconds in enumerate(compute):
        read_at = max(read_at, done[layer - host_layers] if layer >= host_layers else 0.0) + load
        room_at = done[layer - device_layers] if layer >= device_layers else 0.0
        transferred_at = max(transferred_at, read_at, room_at) + transfer
        done.append(max(transferred_at, done[-1] if done else 0.0) + seconds)
    return done[-1]


@dataclass(frozen=True)
class AutoBlend:
    """A blend whose ratio the controller chooses for each request: `Engine(…, blend="auto")` and its options.

    Attributes:
        base: everything but the ratio; its ratio is the floor that quality asks for.
        profile: a `Profile`, or the path of one; `None`: what `calibrate` saved for this model, device and store.
        ratios: to choose among. Each has compiled programs of its own, so they are few.

    Raises:
        CacheBlendError: no ratios, or one that is not in (0, 1].
    """

    base: BlendConfig = field(default_factory=BlendConfig)
    profile: Any = None
    ratios: tuple[float, ...] = LADDER

    def __post_init__(self) -> None:
        if not self.ratios or any(not 0 < ratio <= 1 for ratio in self.ratios):
            raise CacheBlendError(f"ratios must be some in (0, 1], got {self.ratios!r}")
        if self.base.recompute_ratio == 0:
            raise CacheBlendError("the floor of an automatic ratio must be above 0; mode 'reuse' recomputes nothing")

    def configurations(self) -> list[BlendConfig]:
        """The blends that requests may get."""
        floor = self.base.recompute_ratio
        return [replace(self.base, recompute_ratio=r) for r in sorted({floor, *(r for r in self.ratios if r > floor)})]


@dataclass(frozen=True)
class Stored:
    """A span of a prompt that is in the store: where it stands, its size, its tier, and whether it is exact there."""

    start: int
    tokens: int
    num_bytes: int
    tier: str
    exact: bool


@dataclass(frozen=True)
class Decision:
    """What the controller chose for a request, and why. Delays are sums over layers, in seconds.

    Attributes:
        ratio: the recompute ratio, one of a ladder.
        bound: what bound it: `"floor"` (quality: recomputing that much takes longer than loading anyway), `"load"`
            (as much as loading hides), or `"cap"` (the highest ratio allowed, and loading still takes longer).
        load_s, recompute_s: T_load and T_recompute at that ratio.
        predicted_ttft_s: of the request.
        computed_chunks: stored chunks (and prefix) that are recomputed, since loading them would cost more.
        loaded_chunks: the others.
        computed_starts: the positions of `computed_chunks`.
        estimated_by: the profile that the delays come from.
    """

    ratio: float
    bound: str
    load_s: float
    recompute_s: float
    predicted_ttft_s: float
    computed_chunks: int
    loaded_chunks: int
    computed_starts: tuple[int, ...] = field(repr=False)
    estimated_by: str = ""


@dataclass(frozen=True)
class Estimator:
    """Everything that delays are estimated from.

    Attributes:
        name: what to call it.
        tiers: by the names that stored chunks give.
        transfer: from host memory to the device.
        host_layers, device_layers: how far the streamed executor runs ahead.
        executor: the engine's.
    """

    name: str
    compute: ComputeModel
    tiers: dict[str, Tier]
    transfer: Tier
    host_layers: int
    device_layers: int
    executor: str = "auto"

    def load_s(self, stored: Sequence[Stored], num_layers: int) -> float:
        """T_load of one layer of the chunks."""
        total = 0.0
        for name in dict.fromkeys(each.tier for each in stored if each.tier != "device"):
            own = [each for each in stored if each.tier == name]
            total += self.tier(name).load_s(sum(each.num_bytes for each in own) / num_layers, len(own))
        return total

    def tier(self, name: str) -> Tier:
        """The tier of that name; one that was never measured counts as the slowest that was."""
        return self.tiers.get(name) or min(self.tiers.values(), key=lambda tier: tier.bytes_per_s)

    def streams(self, stored: Sequence[Stored]) -> bool:
        """Whether these chunks are streamed, their loading hidden; if not they are loaded before the prefill."""
        slow = any(is_slow(each.tier) for each in stored)
        return bool(stored) and (self.executor == "streamed" or (self.executor == "auto" and slow))

    def ttft_s(self, plan: Plan, stored: Sequence[Stored], layer_bytes: int) -> float:
        """Predicts the TTFT of a plan whose padded layers take `layer_bytes` (K and V)."""
        compute = self.compute.layer_seconds(plan)
        if all(each.tier == "device" for each in stored):
            return self.compute.request_s + sum(compute)
        load = self.load_s(stored, len(compute))
        transfer = self.transfer.load_s(layer_bytes)
        if self.streams(stored):
            return self.compute.request_s + pipeline_s(load, transfer, compute, self.host_layers, self.device_layers)
        return self.compute.request_s + (load + transfer) * len(compute) + sum(compute)


def decide(
    estimator: Estimator,
    planner: Planner,
    length: int,
    stored: Sequence[Stored],
    token_bytes: int,
    ratios: Sequence[float] = LADDER,
    compiled: Callable[[Plan, str], bool] | None = None,
) -> Decision:
    """Chooses the ratio of a request of `length` tokens, and which stored chunks to recompute instead of loading.

    The chunks that load slowest, per token, are recomputed as far as that lowers the predicted TTFT by 5 % or more. The
    planner's own ratio is the floor: `max(r where T_recompute = T_load, floor)`, rounded down to the ladder so that
    loading stays the longer of the two, at most 1. Where chunks are loaded first and not streamed, nothing is hidden,
    and the ratio is the floor.

    Args:
        token_bytes: bytes of one token's K and V in one layer.
        compiled: says which plans are ready to be run, by which executor: what others would save, their compilation
            would cost. All plans are considered if `None`; the one that loads all chunks in any case.
    """
    num_layers = planner.config.num_layers
    slowest = sorted(stored, key=lambda each: -estimator.load_s([each], num_layers) / each.tokens)
    options = []
    for dropped in range(len(stored) + 1):
        kept = slowest[dropped:]
        option, plan = _best_ratio(estimator, planner, length, kept, token_bytes, ratios)
        computed = tuple(sorted(each.start for each in slowest[:dropped]))
        executor = "streamed" if estimator.streams(kept) else "resident"
        if not dropped or compiled is None or compiled(plan, executor):
            options.append(replace(option, computed_chunks=dropped, computed_starts=computed))
    best = min(options, key=lambda option: option.predicted_ttft_s)
    return best if best.predicted_ttft_s < WORTH_IT * options[0].predicted_ttft_s else options[0]


def _best_ratio(
    estimator: Estimator,
    planner: Planner,
    length: int,
    stored: Sequence[Stored],
    token_bytes: int,
    ratios: Sequence[float],
) -> tuple[Decision, Plan]:
    exact = sum(each.tokens for each in stored if each.exact)
    candidates = sum(each.tokens for each in stored) - exact
    load_s = estimator.load_s(stored, planner.config.num_layers) * planner.config.num_layers

    def plan_at(ratio: float) -> Plan:
        at = replace(planner, blend=replace(planner.blend, recompute_ratio=ratio))
        return at.plan("blend", length, exact, min(candidates, length - exact - 1))

    floor = planner.blend.recompute_ratio
    ratio, recompute_s = floor, sum(estimator.compute.layer_seconds(plan_at(floor)))
    bound = "floor"
    if candidates and estimator.streams(stored):
        for higher in sorted(step for step in ratios if step > floor):
            seconds = sum(estimator.compute.layer_seconds(plan_at(higher)))
            if seconds > load_s:
                bound = "load" if ratio > floor else "floor"
                break
            ratio, recompute_s, bound = higher, seconds, "cap"
    plan = plan_at(ratio)
    ttft_s = estimator.ttft_s(plan, stored, token_bytes * plan.cache_length)
    return Decision(ratio, bound, load_s, recompute_s, ttft_s, 0, len(stored), (), estimator.name), plan


def cheapest_tier(
    tiers: Sequence[Tier], layer_bytes: float, recompute_s: float, *, reads: int = 1
) -> tuple[Tier, bool]:
    """Returns the cheapest tier whose loading hides behind recomputing, and whether any does; else the fastest.

    Args:
        tiers: each with its price.
        layer_bytes: bytes of one layer's stored KV.
        recompute_s: T_recompute of one layer at the ratio wanted.
        reads: chunks, each of them a read.

    Raises:
        CacheBlendError: no tiers, or one without a price.

    Source: CacheBlend (arXiv 2405.16444) §5.1, the choice of a storage device.
    """
    if not tiers:
        raise CacheBlendError("the list of tiers is empty; give at least one Tier(name, bytes_per_s, latency_s, price)")
    if without := [tier.name for tier in tiers if tier.price_per_gb_month is None]:
        raise CacheBlendError(f"tier {without[0]!r} has no price; choosing the cheapest needs price_per_gb_month")
    hiding = [tier for tier in tiers if tier.load_s(layer_bytes, reads) <= recompute_s]
    if not hiding:
        return min(tiers, key=lambda tier: tier.load_s(layer_bytes, reads)), False
    return min(hiding, key=lambda tier: (tier.price_per_gb_month, tier.load_s(layer_bytes, reads))), True


def explain(decision: Decision, ttft_s: float) -> str:
    """Says in a few lines what was decided, why, what was predicted, and what happened."""
    why = {
        "floor": "recomputing the least that quality asks for takes longer than loading",
        "load": "as much as loading hides",
        "cap": "the highest allowed, and loading still takes longer",
    }[decision.bound]
    lines = [
        f"recompute ratio {decision.ratio:g}: {why}",
        f"T_load {decision.load_s * 1e3:.1f} ms, T_recompute {decision.recompute_s * 1e3:.1f} ms, over all layers",
        f"{decision.loaded_chunks} stored chunks loaded, {decision.computed_chunks} recomputed as loading costs more",
        f"TTFT predicted {decision.predicted_ttft_s * 1e3:.1f} ms, measured {ttft_s * 1e3:.1f} ms",
        f"estimated by {decision.estimated_by}",
    ]
    return "\n".join(lines)
