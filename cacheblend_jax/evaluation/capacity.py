"""Capacity planning: what a model on some devices can serve, from the delays that the loading controller decides by.

Nothing runs: rates come from a profile of `calibrate`, or from a device's data sheet, de-rated by what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.choices import MODES
from cacheblend_jax.engine.controller import decide
from cacheblend_jax.engine.delays import PAGES_ON_DEVICE, PREFETCH_LAYERS, Estimator
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.errors import CacheBlendError, PromptTooLongError, is_whole_number
from cacheblend_jax.evaluation.capacity_memory import DeviceMemory, device_memory, program_memory
from cacheblend_jax.evaluation.deployment import (
    Deployment,
    PlannedChunk,
    Workload,
    chunk_bytes,
    stored_bytes,
    stored_chunks,
)
from cacheblend_jax.evaluation.split import product_ways, split_over
from cacheblend_jax.model.kv_cache import layer_bytes

HOURS_A_MONTH = 730
OF_EACH_REPLICA = ("device", "host", "nvme")  # others keep one copy, which all share


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


def _plan_mode(mode: str, workload: Workload, deployment: Deployment, estimator: Estimator) -> ModePlan:
    config, planner = deployment.config, deployment.planner
    found = workload.num_found
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
    in_place = estimator.reads_entries_of(chunks[: timed.loaded], config.num_layers)
    ahead = PREFETCH_LAYERS * (PAGES_ON_DEVICE if in_place else 1) if streams else 0
    program = program_memory(
        config,
        timed.plan,
        deployment.num_devices,
        deployment.device.platform,
        deployment.kv_dtype,
        streamed_layers=min(config.num_layers, ahead),
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
