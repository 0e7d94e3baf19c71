"""What Prometheus reads: counts and histograms of requests, and what store and scheduler count themselves."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.serving.health import Health
from cacheblend_jax.serving.scheduling import Scheduling
from cacheblend_jax.store import TenantStore

TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3.5, 5, 10, 30)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, scheduler: Scheduling, store: TenantStore, health: Health) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("cacheblend_requests", "Requests", ("endpoint", "status"), registry=registry)
        self.ttft = Histogram(
            "cacheblend_ttft_seconds", "From a request to its first token", ("mode",), buckets=TTFT_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "cacheblend_token_seconds",
            "From a token to the next; tokens decoded together share their time equally",
            ("mode",),
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "cacheblend_prompt_tokens", "Tokens of prompts: hit (KV from the store), of these recomputed, and missed",
            ("kind",), registry=registry,
        )  # fmt: skip
        self.chunks = Counter("cacheblend_chunks", "Chunks of prompts, hit or missed", ("found",), registry=registry)
        self.answer_tokens = Counter("cacheblend_answer_tokens", "Tokens of answers", registry=registry)
        for kind in ("hit", "recomputed", "missed"):
            self.prompt_tokens.labels(kind)
        for found in ("hit", "miss"):
            self.chunks.labels(found)
        self._hits = self._misses = 0
        registry.register(_Snapshot(scheduler, store, health, self))

    def prefilled(self, stats: PrefillStats, missed_tokens: int) -> None:
        """Counts what a prefill found and computed."""
        self.prompt_tokens.labels("hit").inc(stats.reused)
        self.prompt_tokens.labels("recomputed").inc(round(stats.recompute_ratio * stats.candidates))
        self.prompt_tokens.labels("missed").inc(missed_tokens)
        self.chunks.labels("hit").inc(stats.hits)
        self.chunks.labels("miss").inc(stats.misses)
        self._hits += stats.hits
        self._misses += stats.misses

    def text(self) -> bytes:
        """Returns everything as Prometheus reads it."""
        return generate_latest(self.registry)

    @property
    def hit_rate(self) -> float:
        """Chunks found among all so far; 0 before the first."""
        return self._hits / max(self._hits + self._misses, 1)


class _Snapshot:
    """What others count, read when it is asked for."""

    def __init__(self, scheduler: Scheduling, store: TenantStore, health: Health, metrics: Metrics) -> None:
        self._scheduler, self._store, self._health, self._metrics = scheduler, store, health, metrics

    def collect(self) -> Iterable[Metric]:
        """Returns the metrics; called by the registry."""
        stats, queue = self._store.stats, self._scheduler.stats
        yield _gauge("cacheblend_requests_waiting", "Requests that wait for their prefill", queue.waiting)
        yield _gauge("cacheblend_requests_running", "Requests that are being answered", queue.running)
        yield _gauge("cacheblend_slots", "Requests that may be answered at a time", queue.slots)
        yield _gauge("cacheblend_ready", "1 where the server is ready", int(self._health.is_ready))
        yield _gauge("cacheblend_degraded", "Reasons why it is slow", len(self._health.report()["reasons"]))
        yield _gauge("cacheblend_hit_rate", "Chunks found in the store, since the start", self._metrics.hit_rate)
        yield _gauge("cacheblend_store_queue_bytes", "What waits to be written to disk", stats.queued_bytes)
        pinned = self._store.pinned
        yield _gauge("cacheblend_store_pinned_entries", "Entries that are never evicted", len(pinned))
        yield _gauge("cacheblend_store_pinned_bytes", "Bytes of these", sum(pinned.values()))
        tiers = {"device": stats.device, "host": stats.host, "disk": stats.disk}
        held = GaugeMetricFamily("cacheblend_store_bytes", "What a tier holds", labels=["tier"])
        entries = GaugeMetricFamily("cacheblend_store_entries", "How many entries a tier holds", labels=["tier"])
        evicted = CounterMetricFamily("cacheblend_store_evicted", "Entries that made room", labels=["tier"])
        for name, tier in tiers.items():
            held.add_metric([name], tier.bytes)
            entries.add_metric([name], tier.entries)
            evicted.add_metric([name], tier.evicted)
        errors = CounterMetricFamily("cacheblend_store_errors", "Failures of the file system", labels=["kind"])
        errors.add_metric(["read"], stats.read_errors)
        errors.add_metric(["write"], stats.write_errors)
        yield from (held, entries, evicted, errors)
        yield CounterMetricFamily("cacheblend_store_damaged", "Entries found damaged", value=stats.damaged)
        yield CounterMetricFamily("cacheblend_store_dropped", "Entries not written to disk", value=stats.dropped)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
