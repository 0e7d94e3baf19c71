"""Capacity planning: what a model on some devices can serve, from the delays that the loading controller decides by.

Nothing runs: rates come from a profile of `calibrate`, or from a device's data sheet, de-rated by what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.choices import MODES
from cacheblend_jax.engine.controller import decide
from cacheblend_jax.engine.delays import (
    PAGES_ON_DEVICE,
    PREFETCH_LAYERS,
    Estimator,
    Tier,
    cheapest_tier,
    layers_read_ahead,
)
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.errors import CacheBlendError, PromptTooLongError, is_whole_number
from cacheblend_jax.evaluation.capacity_memory import DeviceMemory, device_memory, program_memory
from cacheblend_jax.evaluation.devices import MEASURED_ON, Device, datasheet_compute, datasheet_link
from cacheblend_jax.evaluation.split import product_ways, split_over
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import layer_bytes

HOURS_A_MONTH = 730
MOST = 10**18  # of anything
# Assumed, where none is measured: what one process reads with its checksums, latency, and a round price in US dollars a
# GB and month. Host memory is what an H100's host delivered where layers are put together there (docs/results.md).
TIERS = {
    "device": Tier("device", 1e15, 0.0, 0.0),
    "host": Tier("host", 18e9, 0.0, 2.0),
    "nvme": Tier("nvme", 6e9, 1e-4, 0.1),
    "network": Tier("network", 1.2e9, 1e-3, 0.08),
    "object": Tier("object", 0.3e9, 3e-2, 0.02),
}
OF_EACH_REPLICA = ("device", "host", "nvme")  # others keep one copy, which all share


@dataclass(frozen=True)
class Workload:
    """What is asked of a service.

    Attributes:
        context: tokens of a prompt, its question included.
        requests_per_s: all replicas together.
        reuse: the share of a prompt's chunks that are stored.
        answer_s: seconds that a request's KV stays on the device after the first token.
        stored_chunks: how many different chunks are kept.

    Raises:
        CacheBlendError: a value that makes no sense; it is named.
    """

    context: int
    requests_per_s: float = 1.0
    reuse: float = 0.9
    chunk_tokens: int = 512
    question_tokens: int = 64
    answer_s: float = 5.0
    stored_chunks: int = 100_000

    def __post_init__(self) -> None:
        for name in ("context", "chunk_tokens", "question_tokens", "stored_chunks"):
            if not is_whole_number(getattr(self, name), least=1):
                raise CacheBlendError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        for name, most in (("requests_per_s", inf), ("answer_s", inf), ("reuse", 1.0)):
            value = getattr(self, name)
            if not (0 <= value <= most and value < inf) or (name == "requests_per_s" and value == 0):
                bounds = "in [0, 1]" if name == "reuse" else "positive and finite"
                raise CacheBlendError(f"{name} must be {bounds}, got {value!r}")
        for name, value in vars(self).items():
            _check_is_conceivable(name, value)
        if self.context < self.chunk_tokens + self.question_tokens:
            raise CacheBlendError(
                f"context must hold a chunk and the question, {self.chunk_tokens} + {self.question_tokens} tokens, "
                f"got {self.context}"
            )

    @property
    def num_chunks(self) -> int:
        """Whole chunks of a prompt; tokens beyond them are computed."""
        return (self.context - self.question_tokens) // self.chunk_tokens


def _check_is_conceivable(name: str, value: float) -> None:
    """Refuses what no service has, whose products may be beyond floating point."""
    if value > MOST:
        raise CacheBlendError(f"{name} must be at most {MOST:.0e}, got more than that")


@dataclass(frozen=True)
class Deployment:
    """What serves it: a replica's model, devices, and the tier that most chunks come from.

    Attributes:
        num_devices: of a replica.
        kv_dtype: what stored KV is quantised to.
        device_tier_bytes: on each device, for stored chunks.
        host_bytes: of a replica's host memory, for stored chunks.
        profile: of `calibrate`, for this model on these devices; `None`: rates of the data sheet.
        price_per_device_hour: `None`: the device's.

    Raises:
        CacheBlendError: the price is negative or not finite, or a number is beyond `MOST`.
    """

    config: ModelConfig
    device: Device
    num_devices: int = 1
    tier: Tier = TIERS["nvme"]
    blend: BlendConfig = field(default_factory=lambda: BlendConfig("auto"))
    kv_dtype: str | None = None
    device_tier_bytes: int = 0
    host_bytes: int = 0
    profile: Profile | None = None
    price_per_device_hour: float | None = None

    def __post_init__(self) -> None:
        price = self.price_per_device_hour
        if price is not None and not 0 <= price < inf:
            raise CacheBlendError(f"price_per_device_hour must be at least 0 and finite, got {price!r}")
        for name in ("num_devices", "device_tier_bytes", "host_bytes", "price_per_device_hour"):
            _check_is_conceivable(name, getattr(self, name) or 0)

    @property
    def planner(self) -> Planner:
        """Plans its prefills; those of a ratio that the controller chooses, once it is fixed."""
        return Planner(self.config, self.blend)

    def with_cheapest(self, tiers: Sequence[Tier], workload: Workload) -> Deployment:
        """Returns it with the cheapest of these tiers that hides behind recomputing, or else the fastest.

        Those whose room is too small for the stored chunks are left out.

        Raises:
            CacheBlendError: all of them are.
        """
        stored = stored_bytes(workload, self)
        roomy = [tier for tier in tiers if stored <= self.room_of(tier)]
        if not roomy:
            replace(self, tier=max(tiers, key=self.room_of)).check_room(workload)
        planner = self.planner.at(self.blend.auto_ratios[0]) if self.blend.is_auto else self.planner
        found = round(workload.reuse * workload.num_chunks)
        candidates = min(found * workload.chunk_tokens, workload.context - 1)
        layer, estimator = layer_bytes(self.config, candidates, self.kv_dtype), self.estimator()
        seconds = estimator.compute.layer_seconds(planner.plan("blend", workload.context, 0, candidates))
        link = estimator.transfer.bytes_per_s
        as_read = [replace(tier, bytes_per_s=link) if self.reads_in_place(tier) else tier for tier in roomy]
        tier, _ = cheapest_tier(as_read, layer, sum(seconds) / len(seconds), reads=max(found, 1))
        return replace(self, tier=next(each for each in roomy if each.name == tier.name))

    def reads_in_place(self, tier: Tier) -> bool:
        """Whether the device reads entries of a tier where they lie (`engine/entry_pages.py`): over its link alone."""
        return tier.name == "host" and self.kv_dtype is None and self.estimator().reads_entries

    def check_room(self, workload: Workload) -> None:
        """Checks that the tier has room for the stored chunks.

        Raises:
            CacheBlendError: it has not.
        """
        stored, room = stored_bytes(workload, self), self.room_of(self.tier)
        if stored > room:
            raise CacheBlendError(
                f"{workload.stored_chunks:,} stored chunks take {stored / 1e9:.1f} GB, and tier {self.tier.name!r} has "
                f"{room / 1e9:.1f}; keep fewer, give it more, or choose another tier"
            )

    def room_of(self, tier: Tier) -> float:
        """Returns the bytes that a tier has for stored chunks, each of which the devices split as they split KV."""
        ways = split_over(self.config, self.num_devices).kv_ways
        return {"device": self.device_tier_bytes * ways, "host": self.host_bytes}.get(tier.name, inf)

    def estimator(self) -> Estimator:
        """Returns what the controller of a replica would estimate delays from."""
        own = {self.tier.name: self.tier}
        ahead = layers_read_ahead(self.config.num_layers, PREFETCH_LAYERS), PREFETCH_LAYERS
        if (profile := self.profile) is not None:
            name, compute, link = "the profile given", profile.compute, profile.transfer
            # A CPU is the one device whose own memory is the host's: see `runtime.link`.
            streams, tiers = profile.device.lower() != "cpu", profile.tiers | own
        else:
            compute = datasheet_compute(self.config, self.device, self.num_devices)
            link = datasheet_link(self.config, self.device, self.num_devices)
            name, streams, tiers = MEASURED_ON, True, {"host": TIERS["host"]} | own
        in_place = streams and self.device.platform == "gpu" and self.num_devices == 1
        return Estimator(name, compute, tiers, link, *ahead, host_streams=streams, reads_entries=in_place)


@dataclass(frozen=True)
class PlannedChunk:
    """A stored chunk of a planned prompt: what delays depend on (see `engine.delays.Loadable`)."""

    tier: str
    num_bytes: int
    num_tokens: int
    start: int
    exact: bool = False
    is_in_memory: bool = False


@dataclass(frozen=True)
class ModePlan:
    """What one mode comes to.

    Attributes:
        ratio: the recompute ratio; `None` where nothing is blended.
        ttft_s: of a request that waits for no other.
        compute_s: of the devices, for one request.
        loaded_bytes: read from the tier, for one request.
        most_requests_per_s: by resource, what one replica can do; the least of them binds.
        replicas: for the workload's requests.
        memory: of each device of one of so many replicas.
    """

    mode: str
    ratio: float | None
    ttft_s: float
    compute_s: float
    loaded_bytes: int
    most_requests_per_s: dict[str, float]
    replicas: int
    memory: DeviceMemory

    @property
    def binds(self) -> str:
        """The resource that is short first."""
        return min(self.most_requests_per_s, key=lambda name: self.most_requests_per_s[name])

    @property
    def requests_per_s(self) -> float:
        """What one replica can do."""
        return self.most_requests_per_s[self.binds]


@dataclass(frozen=True)
class Worth:
    """Where blending pays: it takes less TTFT than full recompute.

    Attributes:
        stored: how many of the prompt's chunks must be stored at least; `None` where it never pays.
        prompt: of how many chunks a prompt must be at least, of which the workload's share is stored; `None` likewise.
        longest: of how many chunks the longest prompts are that it pays for, among those that the model takes.
    """

    stored: int | None
    prompt: int | None
    longest: int | None


@dataclass(frozen=True)
class CapacityPlan:
    """What a workload takes of a deployment; `modes` by name.

    Attributes:
        kv_ways: into how many parts a replica's devices split KV.
        product_ways: the same of a layer's products, which replicated weights make a little less.
        chunk_bytes: of a chunk's KV by how it is stored: as computed, or by `kv_dtype`.
        stored_bytes: of all stored chunks, once.
        copies: how often they are stored.
        storage_cost, device_cost: US dollars a month, of all replicas, in the mode `blend`; `None` where it does not
            fit.
    """

    estimated_by: str
    kv_ways: int
    product_ways: float
    chunk_bytes: dict[str, int]
    stored_bytes: int
    copies: int
    modes: dict[str, ModePlan]
    worth: Worth
    storage_cost: float | None
    device_cost: float | None


def plan_capacity(workload: Workload, deployment: Deployment) -> CapacityPlan:
    """Plans a service: memory, TTFT, throughput and cost by mode.

    Raises:
        CacheBlendError: the prompt is longer than the model takes, the tier has no room for the stored chunks, or a
            number makes no sense.
    """
    config, tier = deployment.config, deployment.tier
    if workload.context > config.max_positions:
        raise PromptTooLongError(
            f"context must be at most {config.max_positions} tokens, which the model takes, got {workload.context}"
        )
    if not is_whole_number(deployment.num_devices, least=1):
        raise CacheBlendError(f"devices must be a whole number of at least 1, got {deployment.num_devices!r}")
    deployment.check_room(workload)
    estimator = deployment.estimator()
    modes = {mode: _plan_mode(mode, workload, deployment, estimator) for mode in MODES}
    dtypes = (None, "int8", "float8_e4m3fn")
    of_chunk = {str(dtype or config.dtype): chunk_bytes(config, workload.chunk_tokens, dtype) for dtype in dtypes}
    stored, replicas = stored_bytes(workload, deployment), modes["blend"].replicas
    copies = replicas if tier.name in OF_EACH_REPLICA else 1
    price = deployment.price_per_device_hour
    hourly = (deployment.device.price_per_hour if price is None else price) * deployment.num_devices
    return CapacityPlan(
        estimator.name,
        split_over(config, deployment.num_devices).kv_ways,
        product_ways(config, deployment.num_devices),
        of_chunk,
        stored,
        copies,
        modes,
        _worth(workload, deployment, estimator),
        storage_cost=copies * stored / 1e9 * (tier.price_per_gb_month or 0.0) if replicas else None,
        device_cost=replicas * hourly * HOURS_A_MONTH if replicas else None,
    )


def chunk_bytes(config: ModelConfig, num_tokens: int, kv_dtype: str | None) -> int:
    """Returns the bytes of a chunk's KV, as it is stored."""
    return config.num_layers * layer_bytes(config, num_tokens, kv_dtype)


def stored_bytes(workload: Workload, deployment: Deployment) -> int:
    """Returns the bytes of all stored chunks, once."""
    return workload.stored_chunks * chunk_bytes(deployment.config, workload.chunk_tokens, deployment.kv_dtype)


def stored_chunks(workload: Workload, deployment: Deployment, count: int, *, exact: bool = False) -> list[PlannedChunk]:
    """Returns the first `count` chunks of a prompt, as they are stored in the deployment's tier."""
    size = chunk_bytes(deployment.config, workload.chunk_tokens, deployment.kv_dtype)
    tokens, in_place = workload.chunk_tokens, deployment.reads_in_place(deployment.tier)
    return [
        PlannedChunk(deployment.tier.name, size, tokens, number * tokens, exact, in_place) for number in range(count)
    ]


def _plan_mode(mode: str, workload: Workload, deployment: Deployment, estimator: Estimator) -> ModePlan:
    config, planner = deployment.config, deployment.planner
    found = round(workload.reuse * workload.num_chunks)
    chunks = stored_chunks(workload, deployment, {"full": 0, "prefix": min(found, 1)}.get(mode, found))
    if mode == "prefix":
        chunks = [replace(chunk, exact=True) for chunk in chunks]
    timed = timed_prefill(estimator, planner, mode, workload.context, chunks, deployment.kv_dtype)
    compute_s = (
        sum(estimator.compute.layer_seconds(timed.plan))
        + sum(estimator.compute.question_seconds(timed.plan))
        + estimator.compute.request_s
    )
    loaded = sum(chunk.num_bytes for chunk in chunks[: timed.loaded])
    streams = estimator.executor_of(chunks[: timed.loaded]) == "streamed"
    in_place = estimator.reads_entries_of(chunks[: timed.loaded])
    program = program_memory(
        config,
        timed.plan,
        deployment.num_devices,
        deployment.device.platform,
        deployment.kv_dtype,
        streamed_layers=PREFETCH_LAYERS * (PAGES_ON_DEVICE if in_place else 1) if streams else 0,
    )
    resident_s = timed.ttft_s + workload.answer_s
    usable = {"device_tier": deployment.device_tier_bytes, "usable": deployment.device.usable_bytes}
    room = device_memory(program, in_flight=1.0, **usable).most_in_flight
    most = {"compute": 1 / compute_s, "memory": room / resident_s if room >= 1 else 0.0}
    if loaded and deployment.tier.name != "device":  # else a request takes its devices' time alone
        passes = 2 if streams and not in_place and timed.plan.needs("question_mass") else 1
        moved = passes * config.num_layers * layer_bytes(config, timed.plan.cache_length, deployment.kv_dtype)
        most |= {"prefills in turn": 1 / timed.ttft_s}  # an engine begins one after the other's first token
        most |= {"link": estimator.transfer.bytes_per_s / moved}
        if not in_place:
            most |= {f"reading from {deployment.tier.name}": estimator.tier(deployment.tier.name).bytes_per_s / loaded}
    able = min(most.values())
    replicas = ceil(workload.requests_per_s / able) if able else 0
    in_flight = workload.requests_per_s / replicas * resident_s if replicas else 1.0
    memory = device_memory(program, in_flight=in_flight, **usable)
    return ModePlan(mode, timed.ratio, timed.ttft_s, compute_s, loaded, most, replicas, memory)


@dataclass(frozen=True)
class TimedPrefill:
    """A prefill's plan and its predicted TTFT; `loaded` counts the chunks that are not recomputed."""

    plan: Plan
    ttft_s: float
    ratio: float | None
    loaded: int


def timed_prefill(
    estimator: Estimator,
    planner: Planner,
    mode: str,
    length: int,
    chunks: Sequence[PlannedChunk],
    kv_dtype: str | None = None,
) -> TimedPrefill:
    """Returns how a prompt of `length` tokens is prefilled with these stored chunks, as an engine decides it."""
    if mode == "blend" and planner.blend.is_auto:
        decision = decide(estimator, planner, length, chunks, kv_dtype=lambda _: kv_dtype)
        kept = [chunk for chunk in chunks if chunk.start not in decision.computed_starts]
        fixed = timed_prefill(estimator, planner.at(decision.ratio), mode, length, kept, kv_dtype)
        return replace(fixed, ratio=decision.ratio)
    exact = sum(chunk.num_tokens for chunk in chunks if chunk.exact)
    candidates = sum(chunk.num_tokens for chunk in chunks) - exact
    plan = planner.plan(mode, length, exact, min(candidates, length - exact - 1))
    ttft_s = estimator.ttft_s(plan, chunks, layer_bytes(planner.config, plan.cache_length, kv_dtype))
    return TimedPrefill(plan, ttft_s, planner.blend.ratio if mode == "blend" else None, len(chunks))


def _worth(workload: Workload, deployment: Deployment, estimator: Estimator) -> Worth:
    """Finds from how many stored chunks, and from how long prompts on, blending takes less TTFT than full recompute."""
    planner, tokens = deployment.planner, workload.chunk_tokens

    def pays(length: int, stored: int) -> bool:
        chunks = stored_chunks(workload, deployment, stored)
        blend = timed_prefill(estimator, planner, "blend", length, chunks, deployment.kv_dtype)
        return blend.loaded > 0 and blend.ttft_s < timed_prefill(estimator, planner, "full", length, []).ttft_s

    counts = _some_counts(workload.num_chunks)
    stored = next((count for count in counts if pays(workload.context, count)), None)
    most = (deployment.config.max_positions - workload.question_tokens) // tokens
    prompts = [
        count
        for count in _some_counts(most)
        if (found := round(workload.reuse * count)) and pays(count * tokens + workload.question_tokens, found)
    ]
    return Worth(stored, *((prompts[0], prompts[-1]) if prompts else (None, None)))


def _some_counts(most: int) -> list[int]:
    """Returns counts from 1 to `most`: all of them up to 8, then about four each time they double."""
    counts = [1]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, counts[-1] * 6 // 5)))
    return counts
