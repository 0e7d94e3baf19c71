"""The simulator: its queues by hand, its tiers against the store itself, its bounds against all that is possible."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import key_of, make_entry

import cacheblend_jax as cb
from cacheblend_jax.engine.background import MAX_PENDING
from cacheblend_jax.evaluation.cache_policies import belady_hits, lru_hits, most_hits, stored_hits
from cacheblend_jax.evaluation.deployment import TIERS, Deployment, Workload
from cacheblend_jax.evaluation.devices import DEVICES
from cacheblend_jax.evaluation.scale_plot import scale_figure
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.simulated_service import (
    PLACES,
    Costs,
    Outcome,
    Service,
    Simulation,
    estimated_costs,
    million_requests_cost,
)
from cacheblend_jax.evaluation.traces import Trace, with_scans, zipf_keys, zipf_trace
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.keys import chunk_key
from cacheblend_jax.store.record import EntryRecord

KEYS = st.lists(st.integers(0, 5), min_size=1, max_size=9).map(lambda keys: np.array(keys, np.int64))
CHUNK = 1000  # bytes


@pytest.fixture(autouse=True)
def _quickly():
    with unchecked():
        yield


def zipf(count: int = 4000, num_keys: int = 300, exponent: float = 0.9) -> np.ndarray:
    return zipf_keys(np.random.default_rng(3), count, num_keys, exponent)


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_the_seeds_and_has_the_popularity_and_the_rate_asked_for():
    options = {"num_chunks": 1000, "exponent": 1.0, "chunks_per_request": 1, "requests_per_s": 50.0, "seed": 4}
    trace, again = zipf_trace(100_000, **options), zipf_trace(100_000, **options)
    assert (trace.arrivals == again.arrivals).all()
    assert (trace.chunks == again.chunks).all()
    counts = np.bincount(trace.chunks.ravel(), minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.1)
    assert trace.arrivals[-1] == pytest.approx(100_000 / 50, rel=0.03)


def test_chunks_of_a_document_come_together():
    trace = zipf_trace(2000, num_chunks=10_000, same_document=1.0)
    documents = trace.chunks // 16
    assert (documents == documents[:, :1]).all()


def test_a_request_wants_each_chunk_once():
    for options in ({"exponent": 2.0}, {"num_chunks": 5}, {"num_chunks": 33, "same_document": 1.0}):
        chunks = np.sort(zipf_trace(3000, **options).chunks, axis=1)
        assert (np.diff(chunks, axis=1) > 0).all()
        assert chunks.min() >= 0


def test_scans_are_a_share_of_keys_used_once():
    keys = with_scans(np.random.default_rng(0), zipf(7000), share=0.3, length=500)
    new = keys[keys >= 300]
    assert keys.size == 10_000
    assert new.size == np.unique(new).size == 3000


# --- policies --------------------------------------------------------------------------------------------------------


def most_possible(keys: list[int], sizes: np.ndarray, capacity: int) -> int:
    """The most hits of any policy, by trying all: after each use, any of what was there and the new one stays."""
    best = {frozenset(): 0}
    for key in keys:
        after: dict[frozenset, int] = {}
        for held, hits in best.items():
            there = held | {key}
            for count in range(len(there) + 1):
                for kept in map(frozenset, itertools.combinations(there, count)):
                    if sizes[list(kept)].sum() <= capacity:
                        after[kept] = max(after.get(kept, 0), hits + (key in held))
        best = after
    return max(best.values())


@given(KEYS, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_belady_reaches_what_is_possible_and_nothing_exceeds_the_bound(keys, capacity):
    ones, sizes = np.ones(6, np.int64), np.array([1, 2, 3, 1, 2, 3])
    assert belady_hits(keys, capacity).sum() == most_possible(keys.tolist(), ones, capacity)
    assert most_hits(keys, ones, capacity).sum() >= belady_hits(keys, capacity).sum()
    assert most_hits(keys, sizes, capacity).sum() >= most_possible(keys.tolist(), sizes, capacity)


def test_lru_hits_what_was_used_within_as_many_different_keys():
    keys = zipf(1500)
    wanted = []
    for place, key in enumerate(keys.tolist()):
        before = keys[:place][::-1].tolist()
        wanted.append(key in before and len(set(before[: before.index(key)])) < 20)
    assert lru_hits(keys, np.ones(300, np.int64), 20).tolist() == wanted


def test_what_is_simulated_is_what_the_store_does(tmp_path):
    """The same uses through a store in memory, whose misses are put, and through one that promotes from disk."""
    keys, entries = zipf(400, 40), [make_entry(seed) for seed in range(40)]
    size, sizes = entries[0].num_bytes, np.full(40, entries[0].num_bytes)
    hits = []
    with cb.ChunkStore(host_bytes=8 * size) as store:
        for key in keys.tolist():
            hits.append((chunk := store.open(key_of(key))) is not None)
            if chunk is None:
                store.put(key_of(key), entries[key])
            else:
                chunk.close()
    assert hits == stored_hits(keys, sizes, 8 * size).tolist()


def test_the_disk_evicts_as_the_tiers_in_memory_do():
    """Its index, one entry a pack, keeps what they keep: the hits differ by less than two of a hundred."""
    keys, capacity = zipf(3000), 30
    index, hits = Index(None), 0
    for key in keys.tolist():
        name = chunk_key("f", np.zeros(0, np.int32), np.array([key], np.int32))
        if index.find(name) is not None:
            hits += 1
            index.touch({name: 1})
            continue
        crcs = (0,)
        record = EntryRecord(name, name, "float32", (1, 1, 1, 2), crcs, crcs, 0.0, "f" * 64, ())
        index.reserve(f"{key:032x}", 1)
        while index.totals()[0] > capacity:
            oldest = index.candidates(capacity)[0]
            index.bury(oldest)
            index.forget_pack(oldest, "dead")
        index.add(f"{key:032x}", 1, [record])
    index.close()
    simulated = stored_hits(keys, np.ones(300, np.int64), capacity).sum()
    assert hits == pytest.approx(simulated, abs=0.02 * keys.size)
    assert hits > lru_hits(keys, np.ones(300, np.int64), capacity).sum() + 0.02 * keys.size


# --- the service -----------------------------------------------------------------------------------------------------


def service(**options) -> Service:
    sizes = {"host_bytes": 20 * CHUNK, "device_bytes": 5 * CHUNK, "store_bytes": 100 * CHUNK}
    return Service(**(sizes | {"store_bytes_per_s": 1e12} | options))


def constant(seconds: float):
    return lambda found: Costs(seconds)


def by_place(found: tuple[int, ...]) -> Costs:
    return Costs(sum(count * seconds for count, seconds in zip(found, (0.01, 0.02, 0.05, 0.2), strict=True)))


def run(trace: Trace, costs=by_place, warm_up=0.0, **options):
    return Simulation(service(**options), costs, CHUNK).run(trace, warm_up)


def small_trace(count: int = 2000, **options) -> Trace:
    return zipf_trace(count, **{"num_chunks": 300, "chunks_per_request": 3, "requests_per_s": 4.0} | options)


def test_one_replica_is_a_queue():
    trace = small_trace(200, requests_per_s=1.5)
    outcome = run(trace, constant(0.5))
    free_at, wanted = 0.0, []
    for arrival in trace.arrivals.tolist():
        free_at = max(free_at, arrival) + 0.5
        wanted.append(free_at - arrival)
    np.testing.assert_allclose(outcome.ttft_s, wanted)
    assert outcome.busy_share == pytest.approx(200 * 0.5 / (free_at - trace.arrivals[0]))


def test_a_request_waits_for_one_chunk_that_is_stored_at_most():
    """The first leaves three to store; the second comes during the second of them, the third finds all of them."""
    trace = Trace(np.array([0.0, 0.8, 9.0]), np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3]]))
    outcome = run(trace, lambda found: Costs(0.5, 0.25))
    np.testing.assert_allclose(outcome.ttft_s, [0.5, 0.2 + 0.5, 0.5])
    assert outcome.found[2].tolist() == [0, 3, 0, 0]
    assert outcome.busy_share == pytest.approx((3 * 0.5 + 6 * 0.25) / 9.5)


def test_requests_that_wait_come_before_what_is_to_be_stored():
    trace = Trace(np.array([0.0, 0.1, 0.2]), np.array([[1], [1], [1]]))
    outcome = run(trace, lambda found: Costs(0.5, 0.25))
    np.testing.assert_allclose(outcome.ttft_s, [0.5, 0.9, 1.3])
    assert outcome.found[:, PLACES.index("none")].tolist() == [1, 1, 1]


def test_as_many_chunks_wait_to_be_stored_as_an_engine_keeps_waiting():
    trace = Trace(np.array([0.0, 900.0]), np.array([np.arange(300), np.arange(300)]))
    outcome = run(trace, lambda found: Costs(0.5, 0.25), store_bytes=10**6, host_bytes=10**6)
    assert outcome.found[1].tolist() == [0, MAX_PENDING, 0, 300 - MAX_PENDING]


def test_the_store_may_be_full_at_first():
    trace = Trace(np.arange(2.0), np.array([[1, 2], [1, 3]]))
    simulation = Simulation(service(), by_place, CHUNK)
    simulation.fill_store(np.array([1, 2, 1]))
    outcome = simulation.run(trace, 0.0)
    assert outcome.found.tolist() == [[0, 0, 2, 0], [1, 0, 0, 1]]
    assert outcome.reads == 1.0


def test_what_is_not_worth_loading_is_not_read_from_the_store():
    simulation = Simulation(service(), lambda found: Costs(0.5, recomputed=found[2]), CHUNK)
    simulation.fill_store(np.array([1, 2]))
    assert simulation.run(Trace(np.zeros(1), np.array([[1, 2]])), 0.0).reads == 0.0


def test_prices_are_those_of_the_load_that_the_busiest_replica_bears():
    deployment = Deployment(SHAPES["llama-3-8b"], DEVICES["H100"])
    outcome = Outcome(np.ones(1), np.ones((1, 4), np.int64), 0.35, 0.7, 0.0)
    even, uneven = (
        million_requests_cost(outcome, service(replicas=10, store_bytes=0, routing=routing), deployment, 100.0)
        for routing in ("random", "chunks")
    )
    hourly = 10 * DEVICES["H100"].price_per_hour
    assert uneven == pytest.approx(1e6 * hourly / (100 * 3600))
    assert even == pytest.approx(uneven / 2)


def test_chunks_may_be_stored_only_when_they_are_missed_again():
    trace = Trace(np.arange(4.0), np.array([[7], [7], [7], [8]]))
    outcome = run(trace, lambda found: Costs(0.1, 0.2), store_after=2)
    assert outcome.found[:, PLACES.index("none")].tolist() == [1, 1, 0, 1]
    assert outcome.busy_share == pytest.approx((4 * 0.1 + 0.2) / (3.1))


def test_chunks_are_found_where_earlier_requests_left_them():
    trace = Trace(np.arange(4.0), np.array([[7, 8], [7, 8], [7, 9], [7, 9]]))
    found = run(trace).found.tolist()
    assert found == [[0, 0, 0, 2], [0, 2, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    far = run(trace, replicas=2, routing="random", seed=1).found  # what the other replica stored is in the store
    assert far[:, PLACES.index("store")].sum() > 0


def test_the_same_seed_gives_the_same_outcome():
    trace = small_trace(500)
    one, other = (run(trace, replicas=5, routing=routing) for routing in ("chunks", "chunks"))
    assert (one.ttft_s == other.ttft_s).all()
    assert (one.found == other.found).all()


def test_requests_routed_by_chunk_find_more_in_memory():
    trace = small_trace(2000, chunks_per_request=1, requests_per_s=10.0)
    at_half = {"replicas": 8, "warm_up": 0.5, "host_bytes": 10 * CHUNK}
    by_chunk, at_random = (run(trace, routing=routing, **at_half) for routing in ("chunks", "random"))
    assert by_chunk.share("device", "host") > at_random.share("device", "host") + 0.1
    assert by_chunk.share("none") < at_random.share("none")  # together they hold more than the store does


def test_a_replica_whose_slots_are_full_is_passed_over():
    trace = Trace(np.arange(12) * 1e-3, np.zeros((12, 1), np.int64))
    assert run(trace, constant(1.0), replicas=4, slots=3).ttft_s.max() < 3.1
    assert run(trace, constant(1.0), replicas=4, slots=12).ttft_s.max() > 11
    assert run(trace, constant(1.0), replicas=2, slots=3).ttft_s.max() > 8  # all are full: the first one takes them


def test_the_store_that_all_share_has_a_speed():
    trace = small_trace(400, requests_per_s=20.0)
    many = {"replicas": 20, "routing": "random", "costs": constant(0.01)}
    fast, slow = (run(trace, **many, store_bytes_per_s=speed) for speed in (1e12, 5 * CHUNK))
    assert slow.ttft_percentile(90) > 2 * fast.ttft_percentile(90)


def test_costs_are_the_controllers_and_grow_with_the_distance():
    config = dataclasses.replace(SHAPES["llama-3-8b"], max_positions=16384)
    costs = estimated_costs(Workload(2624), Deployment(config, DEVICES["H100"], kv_dtype="int8"))
    seconds = [costs(tuple(np.eye(4, dtype=int)[place] * 5)).ttft_s for place in range(4)]
    assert seconds == sorted(seconds)
    alone = estimated_costs(Workload(640, question_tokens=1), Deployment(config, DEVICES["H100"]))
    assert costs((5, 0, 0, 0)).recomputed == 0
    far = Deployment(config, DEVICES["H100"], tier=TIERS["object"], kv_dtype="int8")
    assert estimated_costs(Workload(2624), far)((1, 0, 4, 0)).recomputed >= 4
    assert costs((5, 0, 0, 0)).storing_s == pytest.approx(alone((0, 0, 0, 1)).ttft_s, rel=0.3)


def test_services_are_drawn_with_a_line_for_each_routing(tmp_path):
    lines = [
        {
            "asked": {"replicas": replicas, "routing": routing},
            "found": dict(zip(PLACES, (0.3, 0.2, 0.3, 0.2), strict=True)),
            "ttft_s": {"50": 0.02, "99": 0.2},
            "full_ttft_s": {"50": 0.05, "99": 0.3},
            "usd_per_million": 40.0,
            "full_usd_per_million": 60.0,
        }
        for replicas, routing in ((1, "chunks"), (1000, "random"), (1000, "chunks"))
    ]
    lines[1]["ttft_s"] = None  # grows without bound
    figure = scale_figure(lines)
    found, ttft, cost = figure.axes
    assert [len(line.get_xdata()) for line in (*found.lines, *cost.lines[:-1])] == [2] * 5
    assert [len(line.get_xdata()) for line in ttft.lines[:4]] == [2, 2, 1, 1]
    assert len(ttft.lines) == 6
    assert cost.lines[-1].get_ydata()[0] == 60.0
    assert [label.get_text() for label in cost.get_xticklabels()] == ["1", "1,000"]
    figure.savefig(tmp_path / "scale.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Service(routing="nearest"), "unknown routing 'nearest'; expected one of chunks, random"),
        (lambda: Service(store_bytes_per_s=0.0), "store_bytes_per_s must be positive and finite, got 0.0"),
        (lambda: zipf_trace(1, chunks_per_request=17), "chunks a request must be at most 16, which a document has, "),
        (lambda: Service(replicas=0), "replicas must be a whole number of at least 1, got 0"),
        (lambda: zipf_trace(0), "requests must be a whole number of at least 1, got 0"),
        (lambda: zipf_trace(1, same_document=2.0), "same_document must be a probability, got 2.0"),
    ],
)
def test_wrong_numbers_are_named(make, message):
    with pytest.raises(cb.CacheBlendError, match=f"^{message}"):
        make()
