"""Delays: how long recomputing a layer and loading its KV take, estimated from measurements.

The loading controller decides by them (CacheBlend, arXiv 2405.16444, §5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, runtime_checkable

from cacheblend_jax.blend.flops import layer_flops
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.engine.entry_pages import are_worth_sending
from cacheblend_jax.engine.loading import READERS
from cacheblend_jax.engine.planner import choose_executor
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import layer_bytes

PREFETCH_LAYERS = 4  # while streaming, how many layers of stored KV may be on the device at a time, by default
PAGES_AHEAD = 2  # times as many layers ahead, where they come in pages: one of a long chunk holds rows of eight layers
PAGES_ON_DEVICE = 2 * PAGES_AHEAD  # times as many layers: those ahead, and those whose steps are not done


@dataclass(frozen=True)
class ComputeModel:
    """Seconds of a layer step, linear in the sizes it is compiled for, and of the rest of a request.

    Attributes:
        layer_s: per layer.
        key_s: per key of the cache, which is rotated, written and read.
        projected_s: per row whose K, V are computed.
        attending_s: per row that goes on: queries, output projection, MLP.
        visible_s: per pair of a row that goes on and a key that it sees.
        request_s: once per request.
    """

    layer_s: float
    key_s: float
    projected_s: float
    attending_s: float
    visible_s: float
    request_s: float = 0.0

    def layer_seconds(self, plan: Plan) -> list[float]:
        """T_recompute of each layer of a plan."""
        return list(_layer_seconds(self, plan))

    def question_seconds(self, plan: Plan) -> list[float]:
        """Seconds of each layer of the pass of the question alone, which some selectors need; else none."""
        if not plan.needs("question_mass"):
            return []
        rows, keys = plan.forced, plan.cache_length
        seconds = self.layer_s + (self.projected_s + self.attending_s) * rows + self.visible_s * rows * keys
        return [seconds] * (plan.stages[-1].border + 1)


def compute_model(
    config: ModelConfig,
    *,
    flops_per_s: float,
    attention_flops_per_s: float,
    bytes_per_s: float,
    layer_s: float,
    attending_s: float = 0.0,
    request_s: float = 1e-3,
) -> ComputeModel:
    """Returns the coefficients that follow from a device's rates, where no profile has measured them.

    Args:
        flops_per_s: of products with weights.
        bytes_per_s: at which KV is read, rotated and written.
        attending_s: what a row that goes on takes besides: its share of the traffic between devices.
    """
    flops = layer_flops(config)
    return ComputeModel(
        layer_s=layer_s,
        key_s=4 * layer_bytes(config, 1) / bytes_per_s,  # read and written, by rotation and by the blend
        projected_s=flops.projected / flops_per_s,
        attending_s=flops.attending / flops_per_s + attending_s,
        visible_s=2 * flops.visible / attention_flops_per_s,
        request_s=request_s,
    )


@lru_cache(maxsize=4096)
def _layer_seconds(model: ComputeModel, plan: Plan) -> tuple[float, ...]:
    """Remembered: of one request, the controller looks at plans for each number of chunks and each ratio."""
    coefficients = (model.layer_s, model.key_s, model.projected_s, model.attending_s, model.visible_s)
    return tuple(sum(c * x for c, x in zip(coefficients, sizes, strict=True)) for sizes in layer_sizes(plan))


def layer_sizes(plan: Plan) -> list[tuple[float, float, float, float, float]]:
    """Returns the sizes that each layer's time is linear in, in the order of `ComputeModel`'s coefficients.

    Rows are spread over the prompt, so that each sees half of the keys on average.
    """
    sizes: list[tuple[float, float, float, float, float]] = []
    for stage, after in pairwise((*plan.stages, None)):
        assert stage is not None
        for layer in range(stage.first, stage.border + 1):
            attending = stage.rows if layer < stage.border else 1 if after is None else after.rows
            sizes.append((1.0, plan.cache_length, stage.rows, attending, attending * plan.cache_length / 2))
    return sizes


@runtime_checkable
class Loadable(Protocol):
    """A stored chunk at its place in a prompt, as far as delays depend on it; the engine's is a `PlacedChunk`."""

    @property
    def tier(self) -> str:
        """Where its KV is."""

    @property
    def is_in_memory(self) -> bool:
        """Whether its KV lies in host memory as values, where a device may read them."""

    @property
    def num_bytes(self) -> int:
        """Of its KV as it is stored, all layers together."""

    @property
    def num_tokens(self) -> int:
        """Its own tokens."""

    @property
    def start(self) -> int:
        """Position of its first token in the prompt."""

    @property
    def exact(self) -> bool:
        """Whether it is never recomputed."""


@dataclass(frozen=True)
class Tier:
    """A place to keep KV: throughput in bytes/s, latency of a read in seconds, and price per GB and month.

    Raises:
        CacheBlendError: the throughput is not positive and finite, or the latency or price is negative or infinite.
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
            raise CacheBlendError(
                f"tier {self.name!r}: latency_s must be at least 0 and finite, got {self.latency_s!r}"
            )
        if self.price_per_gb_month is not None and not 0 <= self.price_per_gb_month < float("inf"):
            raise CacheBlendError(
                f"tier {self.name!r}: price_per_gb_month must be at least 0 and finite, got {self.price_per_gb_month!r}"
            )

    def load_s(self, num_bytes: float, reads: int = 1) -> float:
        """T_load: seconds to load `num_bytes` in `reads` reads, several of them at a time."""
        return num_bytes / self.bytes_per_s + self.latency_s * -(-reads // READERS)


def pipeline_s(
    load: float, transfer: float, compute: Sequence[float], host_layers: int, device_layers: int, kept: int = 0
) -> float:
    """Returns the seconds until the last layer is computed, where each takes `load` to read, then `transfer`.

    Reading a layer begins once the one `host_layers` before it is done, its transfer once the one `device_layers`
    before it is: the order of the streamed executor. The first `kept` layers are on the device already.
    """
    done: list[float] = []
    for seconds in compute[:kept]:
        done.append((done[-1] if done else 0.0) + seconds)
    read_at = transferred_at = 0.0
    loaded: list[float] = []
    for place, seconds in enumerate(compute[kept:]):
        read_at = max(read_at, loaded[place - host_layers] if place >= host_layers else 0.0) + load
        room_at = loaded[place - device_layers] if place >= device_layers else 0.0
        transferred_at = max(transferred_at, read_at, room_at) + transfer
        done.append(max(transferred_at, done[-1] if done else 0.0) + seconds)
        loaded.append(done[-1])
    return done[-1]


def layers_read_ahead(num_layers: int, prefetch_layers: int) -> int:
    """Returns how many layers are read ahead into host memory: half of the model's, or `prefetch_layers` if more.

    While the layers up to the check layer compute all tokens, a tier about as fast as the whole recompute delivers
    several more layers; without room for them it would stand idle.
    """
    return max(prefetch_layers, -(-num_layers // 2))


@dataclass(frozen=True)
class Estimator:
    """Everything that delays are estimated from.

    Attributes:
        name: where the figures come from, for `Decision.estimated_by`.
        tiers: by name (`StoredChunk.tier`).
        transfer: from host memory to the device.
        host_layers, device_layers: how many layers the streamed executor reads and transfers ahead.
        executor: the engine's setting.
        host_streams: whether layers go from host memory to the device beside computation.
        page_rows: of a page (`entry_pages.page_rows`), where the device reads entries where they lie in host memory, so
            that a streamed prefill whose chunks are all there waits for the transfer alone; else 0.
    """

    name: str
    compute: ComputeModel
    tiers: dict[str, Tier]
    transfer: Tier
    host_layers: int
    device_layers: int
    executor: str = "auto"
    host_streams: bool = False
    page_rows: int = 0

    def load_s(self, chunks: Sequence[Loadable], num_layers: int) -> float:
        """T_load of one layer of stored chunks."""
        if self.reads_entries_of(chunks, num_layers):
            return 0.0
        total = 0.0
        for name in dict.fromkeys(chunk.tier for chunk in chunks if chunk.tier != "device"):
            own = [chunk for chunk in chunks if chunk.tier == name]
            total += self.tier(name).load_s(sum(chunk.num_bytes for chunk in own) / num_layers, len(own))
        return total

    def tier(self, name: str) -> Tier:
        """Returns the tier of that name; one that was not measured counts as the slowest measured one."""
        return self.tiers.get(name) or min(self.tiers.values(), key=lambda tier: tier.bytes_per_s)

    def executor_of(self, chunks: Sequence[Loadable]) -> str:
        """Returns the executor of a prefill with these chunks; only a streamed one hides loading."""
        return choose_executor(self.executor, [chunk.tier for chunk in chunks], host_streams=self.host_streams)

    def _streams(self, chunks: Sequence[Loadable]) -> bool:
        return self.executor_of(chunks) == "streamed"

    def reads_entries_of(self, chunks: Sequence[Loadable], num_layers: int) -> bool:
        """Returns whether a prefill with these chunks reads all of them where they lie in host memory."""
        if not (self.page_rows and all(each.is_in_memory for each in chunks) and self._streams(chunks)):
            return False
        rows = [num_layers * each.num_tokens for each in chunks]
        return are_worth_sending(sum(-(-count // self.page_rows) for count in rows), self.page_rows, sum(rows))

    def delivery_s(self, chunks: Sequence[Loadable], num_layers: int, layer_bytes: float) -> float:
        """T_load of one layer that takes `layer_bytes` (K and V, padded) on the device: the way there is part of it.

        While layers are streamed, one is read as another is transferred; else one follows the other.
        """
        if not chunks or all(chunk.tier == "device" for chunk in chunks):
            return 0.0
        load, transfer = self.load_s(chunks, num_layers), self.transfer.load_s(layer_bytes)
        return max(load, transfer) if self._streams(chunks) else load + transfer

    def ttft_s(self, plan: Plan, chunks: Sequence[Loadable], layer_bytes: int, kept: int = 0) -> float:
        """Predicts the TTFT of a plan whose padded layers take `layer_bytes`, and `kept` of which the device has."""
        compute, question = self.compute.layer_seconds(plan), self.compute.question_seconds(plan)
        request = self.compute.request_s
        if all(chunk.tier == "device" for chunk in chunks):
            return request + sum(question) + sum(compute)
        load = self.load_s(chunks, len(compute))
        transfer = self.transfer.load_s(layer_bytes)
        if not self._streams(chunks):
            return request + (load + transfer) * len(compute) + sum(question) + sum(compute)
        if not question:
            return request + pipeline_s(load, transfer, compute, self.host_layers, self.device_layers, kept)
        # All layers are loaded for the question. Where they come in pages, they are in the cache then; else they are in
        # host memory, and transferred a second time for the blend.
        asked = pipeline_s(load, transfer, question, len(question), self.device_layers, kept)
        again = 0.0 if self.reads_entries_of(chunks, len(compute)) else transfer
        return request + asked + pipeline_s(0.0, again, compute, len(compute), self.device_layers, kept)


def cheapest_tier(
    tiers: Sequence[Tier], layer_bytes: float, recompute_s: float, *, reads: int = 1
) -> tuple[Tier, bool]:
    """Returns the cheapest tier whose loading hides behind recomputing, and `True`; else the fastest, and `False`.

    Args:
        tiers: each with its price.
        layer_bytes: bytes of one layer's stored KV.
        recompute_s: T_recompute of one layer at the ratio wanted.
        reads: the number of chunks, each of which is one read.

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
