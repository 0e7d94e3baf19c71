"""A service of many replicas, simulated request by request over the store's own eviction, admission and routing.

Each replica has tiers in memory (`store.tiered_memory`) and prefills one request at a time; all share one store, which
evicts as the tiers do. How long a prefill takes is what the loading controller would estimate. Missing chunks are
computed by themselves and stored while no request waits.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import inf

import numpy as np
from jaxtyping import Float, Int

from cacheblend_jax.engine.background import MAX_PENDING
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.evaluation.cache_policies import SizedEntry
from cacheblend_jax.evaluation.capacity import HOURS_A_MONTH, timed_prefill
from cacheblend_jax.evaluation.deployment import Deployment, PlannedChunk, Workload, chunk_bytes, is_in_memory
from cacheblend_jax.evaluation.traces import Trace
from cacheblend_jax.store.memory import MemoryTier
from cacheblend_jax.store.rendezvous import in_order
from cacheblend_jax.store.tiered_memory import HasRoom, TieredMemory

PLACES = ("device", "host", "store", "none")  # where a chunk is found, nearest first
ROUTINGS = ("chunks", "random")
PRICED_LOAD = 0.7  # of the time, how much replicas are busy where requests are priced


@dataclass(frozen=True)
class Service:
    """What is simulated.

    Attributes:
        host_bytes, device_bytes: of each replica, for stored chunks.
        store_bytes: of the store that all share; 0: there is none.
        store_bytes_per_s: of all reads from it together; a replica alone reads at the speed of its deployment's tier.
        routing: `"chunks"`: to the replica that has most of the request's chunks; or `"random"`.
        slots: requests that a replica may have before its chunks' requests go to the next one.
        store_after: a missing chunk's stand-alone KV is computed and stored the n-th time that it is missed; the
            engine does so the first time.

    Raises:
        CacheBlendError: an unknown routing, or a number that is not whole or too small.
    """

    replicas: int = 1
    host_bytes: int = 32 * 10**9
    device_bytes: int = 8 * 10**9
    store_bytes: int = 10 * 10**12
    store_bytes_per_s: float = 200e9
    routing: str = "chunks"
    slots: int = 8
    store_after: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise CacheBlendError(f"unknown routing {self.routing!r}; expected one of {', '.join(ROUTINGS)}")
        for name, least in (("replicas", 1), ("slots", 1), ("host_bytes", 1), ("device_bytes", 0), ("store_bytes", 0)):
            if not is_whole_number(getattr(self, name), least=least):
                raise CacheBlendError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)!r}")
        if not 0 < self.store_bytes_per_s < inf:
            raise CacheBlendError(f"store_bytes_per_s must be positive and finite, got {self.store_bytes_per_s!r}")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of the requests after the warm-up.

    Attributes:
        ttft_s: of each, from its arrival to its first token.
        found: how many of its chunks were in each of `PLACES`.
        busy_share: of the replicas' time, how much they spent prefilling, for requests and to store chunks.
        busiest_share: the same of the busiest replica.
        reads: how many chunks a request reads from the store that all share, a mean.
    """

    ttft_s: Float[np.ndarray, " requests"]
    found: Int[np.ndarray, "requests tiers"]
    busy_share: float
    busiest_share: float
    reads: float

    def share(self, *tiers: str) -> float:
        """Returns the share of all look-ups that found their chunk in one of these tiers."""
        return float(self.found[:, [PLACES.index(tier) for tier in tiers]].sum() / self.found.sum())

    def ttft_percentile(self, percent: float) -> float:
        """Returns a percentile of TTFT in seconds."""
        return float(np.percentile(self.ttft_s, percent))


@dataclass(frozen=True)
class Costs:
    """What a request takes of a replica.

    Attributes:
        ttft_s: until its first token.
        storing_s: thereafter, for each chunk that is stored.
        recomputed: how many of its stored chunks are not worth loading: the farthest ones.
    """

    ttft_s: float
    storing_s: float = 0.0
    recomputed: int = 0


@dataclass(eq=False)
class _Replica:
    """A replica, and what it does at the moment: a request, or else a chunk to store, or nothing."""

    memory: TieredMemory[SizedEntry, SizedEntry]
    waiting: deque[int] = field(default_factory=deque)
    to_store: dict[str, float] = field(default_factory=dict)  # seconds of each, in the order in which they are computed
    request: int | None = None
    chunk: str | None = None

    @property
    def is_busy(self) -> bool:
        return self.request is not None or self.chunk is not None

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + (self.request is not None)

    def store_later(self, key: str, seconds: float) -> None:
        """Queues a chunk as the engine does: once, and not beyond a bound."""
        if key not in self.to_store and len(self.to_store) < MAX_PENDING:
            self.to_store[key] = seconds


class Simulation:
    """Runs a trace through a service.

    Args:
        costs: of a request, by how many of its chunks are in each of `PLACES`.
        num_bytes: of a chunk.
    """

    def __init__(self, service: Service, costs: Callable[[tuple[int, ...]], Costs], num_bytes: int) -> None:
        self._service, self._costs = service, costs
        self._entry = SizedEntry(num_bytes)
        self._store: MemoryTier[SizedEntry] = MemoryTier(service.store_bytes)
        self._store_free_at, self._missed = 0.0, Counter[str]()
        lock = threading.Lock()
        memory = service.host_bytes, service.device_bytes, lock
        self._replicas = [_Replica(TieredMemory(*memory)) for _ in range(service.replicas)]
        self._random = np.random.default_rng(service.seed)

    def fill_store(self, chunks: Int[np.ndarray, " uses"]) -> None:
        """Uses chunks of the store, and stores those that it lacks: what earlier requests left there."""
        for key in map(str, chunks.tolist()):
            if self._store.get(key) is None:
                self._store.put(key, self._entry, 1)

    def run(self, trace: Trace, warm_up: float = 0.5) -> Outcome:
        """Runs all requests; what is returned leaves out the first `warm_up` of them, which fill the tiers."""
        arrivals, wanted = trace.arrivals.tolist(), trace.chunks.tolist()
        ttft_s, reads = np.zeros(trace.num_requests), np.zeros(trace.num_requests, np.int64)
        found = np.zeros((trace.num_requests, len(PLACES)), np.int64)
        first = int(warm_up * trace.num_requests)
        began, busy_s = arrivals[first], np.zeros(len(self._replicas))
        ends: list[tuple[float, int]] = []  # when which replica is done with what it does

        def occupy(number: int, seconds: float, now: float) -> None:
            busy_s[number] += max(0.0, now + seconds - max(now, began))
            heapq.heappush(ends, (now + seconds, number))

        def start(number: int, request: int, now: float) -> None:
            replica = self._replicas[number]
            replica.request = request
            counts, missing = self._look_up(replica, wanted[request])
            costs = self._costs(counts)
            read = max(0, counts[PLACES.index("store")] - costs.recomputed)
            seconds = self._wait_for_store(read, now) + costs.ttft_s
            found[request], reads[request], ttft_s[request] = counts, read, now + seconds - arrivals[request]
            for key in missing:
                replica.store_later(key, costs.storing_s)
            occupy(number, seconds, now)

        def finish() -> float:
            now, number = heapq.heappop(ends)
            replica = self._replicas[number]
            if replica.request is not None:
                self._promote(replica, wanted[replica.request])
            elif replica.chunk is not None:
                self._keep(replica, replica.chunk)
            replica.request = replica.chunk = None
            if replica.waiting:
                start(number, replica.waiting.popleft(), now)
            elif (chunk := self._next_to_store(replica)) is not None:
                replica.chunk = chunk
                occupy(number, replica.to_store.pop(chunk), now)
            return now

        for request, arrival in enumerate(arrivals):
            while ends and ends[0][0] <= arrival:
                finish()
            number = self._replica_for(request, wanted[request])
            if self._replicas[number].is_busy:
                self._replicas[number].waiting.append(request)
            else:
                start(number, request, arrival)
        last = arrivals[-1]
        while any(replica.num_requests for replica in self._replicas):
            last = finish()
        for end, number in ends:  # chunks that are stored after the last request
            busy_s[number] -= end - last
        shares = busy_s / (last - began)
        return Outcome(ttft_s[first:], found[first:], float(shares.mean()), float(shares.max()), reads[first:].mean())

    def _look_up(self, replica: _Replica, chunks: list[int]) -> tuple[tuple[int, ...], list[str]]:
        """Looks a request's chunks up; returns how many are in each place, and which missing ones are to be stored."""
        counts, to_store, memory = dict.fromkeys(PLACES, 0), [], replica.memory
        for chunk in dict.fromkeys(chunks):
            key = str(chunk)
            on_host, on_device = memory.use(key)
            memory.count_use(key)
            if on_device is not None:
                counts["device"] += 1
            elif on_host is not None:
                counts["host"] += 1
            elif self._store.get(key) is not None:
                counts["store"] += 1
            else:
                counts["none"] += 1
                self._missed[key] += 1
                if self._missed[key] >= self._service.store_after:
                    to_store.append(key)
        return tuple(counts.values()), to_store

    def _wait_for_store(self, num_chunks: int, now: float) -> float:
        """Returns the seconds until reads from the store that others began are done."""
        if not num_chunks:
            return 0.0
        began = max(now, self._store_free_at)
        self._store_free_at = began + num_chunks * self._entry.num_bytes / self._service.store_bytes_per_s
        return began - now

    def _next_to_store(self, replica: _Replica) -> str | None:
        """Returns the next chunk to compute by itself; those that are stored by now are dropped."""
        for key in list(replica.to_store):
            if replica.memory.host.peek(key) is None and self._store.peek(key) is None:
                return key
            del replica.to_store[key]
        return None

    def _keep(self, replica: _Replica, key: str) -> None:
        """Stores a chunk that was computed by itself."""
        replica.memory.put(key, self._entry, 1)
        if self._service.store_bytes:
            self._store.put(key, self._entry, 1)

    def _promote(self, replica: _Replica, chunks: list[int]) -> None:
        """Copies the chunks that a request found into faster tiers, as far as these admit them."""
        to_device = (lambda entry: entry) if self._service.device_bytes else None
        for key in dict.fromkeys(map(str, chunks)):
            replica.memory.promote(key, self._read, to_device)

    def _read(self, key: str, has_room: HasRoom) -> tuple[SizedEntry, int] | None:
        """Reads an entry from the store for which there is room, with its uses."""
        stored = self._store.peek(key)
        return (stored, self._store.uses(key)) if stored is not None and has_room(stored.num_bytes) else None

    def _replica_for(self, request: int, chunks: list[int]) -> int:
        """Returns the number of the replica that a request is sent to."""
        replicas, slots = self._replicas, self._service.slots
        if len(replicas) == 1:
            return 0
        if self._service.routing == "random":
            return int(self._random.integers(len(replicas)))
        weights = dict.fromkeys(chunks, 1)
        preferred = {chunk: self._preferred(chunk) for chunk in weights}
        order = in_order(weights, preferred, lambda number: hash((request, number)))
        full = next(order)
        if replicas[full].num_requests < slots:
            return full
        return next((number for number in order if replicas[number].num_requests < slots), full)

    def _preferred(self, chunk: int) -> Iterator[int]:
        """Yields replicas as rendezvous hashing orders them for a chunk: all, in an order of its own."""
        yield self._home(chunk)
        yield from np.random.default_rng((self._service.seed, chunk)).permutation(len(self._replicas)).tolist()

    def _home(self, chunk: int) -> int:
        return hash((self._service.seed, chunk)) % len(self._replicas)  # a tuple of numbers hashes alike everywhere


def estimated_costs(workload: Workload, deployment: Deployment) -> Callable[[tuple[int, ...]], Costs]:
    """Returns what gives a blend's costs, by how many of its chunks are in each of `PLACES`.

    TTFT is what the controller estimates; a chunk is stored once its stand-alone KV is computed, by a prefill of its
    own. Both are remembered by these numbers.
    """
    config, planner, estimator = deployment.config, deployment.planner, deployment.estimator()
    size, tokens = chunk_bytes(config, workload.chunk_tokens, deployment.kv_dtype), workload.chunk_tokens
    standalone_s = timed_prefill(estimator, planner, "full", tokens, []).ttft_s

    @cache
    def costs(found: tuple[int, ...]) -> Costs:
        tiers = [tier for tier, count in zip(PLACES[:-1], found, strict=False) for _ in range(count)]
        names = [deployment.tier.name if tier == "store" else tier for tier in tiers]
        chunks = [
            PlannedChunk(name, size, tokens, place * tokens, is_in_memory=is_in_memory(name, deployment.kv_dtype))
            for place, name in enumerate(names)
        ]
        length = sum(found) * tokens + workload.question_tokens
        mode = "blend" if chunks else "full"
        timed = timed_prefill(estimator, planner, mode, length, chunks, deployment.kv_dtype)
        return Costs(timed.ttft_s, standalone_s, len(chunks) - timed.loaded)

    return costs


def million_requests_cost(
    outcome: Outcome, service: Service, deployment: Deployment, requests_per_s: float, load: float = PRICED_LOAD
) -> float:
    """Returns US dollars a million requests, where replicas take as many as keep them busy for a share of the time.

    Devices by the hour, and the store that all share by the month; the replicas' own memory comes with them. Routed by
    chunk, it is the busiest replica that is busy for that share: beyond it, requests wait or go elsewhere.

    Args:
        requests_per_s: of the trace.
    """
    busy_share = outcome.busiest_share if service.routing == "chunks" else outcome.busy_share
    most_requests_per_s = requests_per_s * load / busy_share
    hourly = deployment.device.price_per_hour * deployment.num_devices * service.replicas
    monthly = service.store_bytes / 1e9 * (deployment.tier.price_per_gb_month or 0.0)
    return 1e6 * (hourly + monthly / HOURS_A_MONTH) / (3600 * most_requests_per_s)
