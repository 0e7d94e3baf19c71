"""What a service is asked, and what serves it: the model, its devices, and the tier that stored chunks come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.delays import PREFETCH_LAYERS, Estimator, Tier, cheapest_tier, layers_read_ahead
from cacheblend_jax.engine.entry_pages import page_rows
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.evaluation.devices import MEASURED_ON, Device, datasheet_compute, datasheet_link
from cacheblend_jax.evaluation.split import split_over
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import layer_bytes

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

    @property
    def num_found(self) -> int:
        """Those of them that are stored."""
        return round(self.reuse * self.num_chunks)


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
        candidates = min(workload.num_found * workload.chunk_tokens, workload.context - 1)
        layer, estimator = layer_bytes(self.config, candidates, self.kv_dtype), self.estimator()
        seconds = estimator.compute.layer_seconds(planner.plan("blend", workload.context, 0, candidates))
        link = estimator.transfer.bytes_per_s

        def as_loaded(tier: Tier) -> Tier:
            in_place = replace(self, tier=tier).reads_in_place(workload)
            return replace(tier, bytes_per_s=link, latency_s=0.0) if in_place else tier

        as_read = [as_loaded(tier) for tier in roomy]
        tier, _ = cheapest_tier(as_read, layer, sum(seconds) / len(seconds), reads=max(workload.num_found, 1))
        return replace(self, tier=roomy[as_read.index(tier)])

    def reads_in_place(self, workload: Workload) -> bool:
        """Returns whether the device reads a prompt's stored chunks where they lie: over its link alone."""
        found = stored_chunks(workload, self, workload.num_found)
        return self.estimator().reads_entries_of(found, self.config.num_layers)

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
            streams, tiers = not profile.device.lower().startswith("cpu"), profile.tiers | own
            is_gpu = streams and not profile.device.lower().startswith("tpu")
        else:
            compute = datasheet_compute(self.config, self.device, self.num_devices)
            link = datasheet_link(self.config, self.device, self.num_devices)
            name, streams, tiers = MEASURED_ON, True, {"host": TIERS["host"]} | own
            is_gpu = self.device.platform == "gpu"
        rows = page_rows(self.config) if is_gpu and self.num_devices == 1 else 0
        return Estimator(name, compute, tiers, link, *ahead, host_streams=streams, page_rows=rows)


def chunk_bytes(config: ModelConfig, num_tokens: int, kv_dtype: str | None) -> int:
    """Returns the bytes of a chunk's KV, as it is stored."""
    return config.num_layers * layer_bytes(config, num_tokens, kv_dtype)


def stored_bytes(workload: Workload, deployment: Deployment) -> int:
    """Returns the bytes of all stored chunks, once."""
    return workload.stored_chunks * chunk_bytes(deployment.config, workload.chunk_tokens, deployment.kv_dtype)


@dataclass(frozen=True)
class PlannedChunk:
    """A stored chunk of a planned prompt: what delays depend on (see `engine.delays.Loadable`)."""

    tier: str
    num_bytes: int
    num_tokens: int
    start: int
    exact: bool = False
    is_in_memory: bool = False


def stored_chunks(workload: Workload, deployment: Deployment, count: int, *, exact: bool = False) -> list[PlannedChunk]:
    """Returns the first `count` chunks of a prompt, as they are stored in the deployment's tier."""
    size = chunk_bytes(deployment.config, workload.chunk_tokens, deployment.kv_dtype)
    tier, tokens = deployment.tier.name, workload.chunk_tokens
    in_memory = is_in_memory(tier, deployment.kv_dtype)
    return [PlannedChunk(tier, size, tokens, number * tokens, exact, in_memory) for number in range(count)]


def is_in_memory(tier: str, kv_dtype: str | None) -> bool:
    """Returns whether chunks of a tier lie in host memory as values, where a device may read them."""
    return tier == "host" and kv_dtype is None
