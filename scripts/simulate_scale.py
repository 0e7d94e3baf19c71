"""Simulates services of 1 to 1,000 replicas over the store's own policies, and compares those with others.

    python scripts/simulate_scale.py service --out service.jsonl --plot docs/scale.png
    python scripts/simulate_scale.py policies

A million requests take two minutes or more of one core. Routed at random, replicas are alike: of many, --sample are
simulated, over their part of the store's bandwidth. Lines that --out has already are not run again. See docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.evaluation.cache_policies import POLICIES, belady_hits
from cacheblend_jax.evaluation.deployment import TIERS, Deployment, Workload, chunk_bytes
from cacheblend_jax.evaluation.devices import DEVICES
from cacheblend_jax.evaluation.scale_plot import scale_figure
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.simulated_service import (
    PLACES,
    PRICED_LOAD,
    ROUTINGS,
    Outcome,
    Service,
    Simulation,
    estimated_costs,
    million_requests_cost,
)
from cacheblend_jax.evaluation.traces import with_scans, zipf_keys, zipf_trace

CHUNKS = 10**6
SETTINGS = "requests_per_replica earlier_requests sample exponent requests_per_s shape device tier".split()
VARIED = ("replicas", "routing")  # what services that are drawn together differ in


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    service = kinds.add_parser("service")
    service.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100, 1000])
    service.add_argument("--routing", choices=ROUTINGS, nargs="+", default=ROUTINGS)
    service.add_argument("--requests-per-replica", type=int, default=5000, help="the second half counts")
    service.add_argument("--earlier-requests", type=int, default=500_000, help="whose chunks the store has at first")
    service.add_argument("--sample", type=int, default=100, help="replicas that stand for more, at random")
    service.add_argument("--exponent", type=float, default=0.9)
    service.add_argument("--requests-per-s", type=float, default=8.0, help="for each replica")
    service.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    service.add_argument("--device", choices=sorted(DEVICES), default="H100")
    service.add_argument("--host-gb", type=float, default=64.0)
    service.add_argument("--device-gb", type=float, default=8.0)
    service.add_argument("--store-tb", type=float, default=10.0)
    service.add_argument("--store-gb-per-s", type=float, default=2000.0, help="to all replicas together")
    service.add_argument(
        "--tier", choices=[*TIERS][1:], default="nvme", help="as which a replica alone reads the store"
    )
    service.add_argument("--store-after", type=int, default=1, help="misses of a chunk")
    service.add_argument("--seed", type=int, default=0)
    service.add_argument("--out", type=Path, help="a JSON line for each service")
    service.add_argument("--plot", type=Path, help="draws what --out has of such services")
    policies = kinds.add_parser("policies")
    policies.add_argument("--uses", type=int, default=300_000)
    policies.add_argument("--capacities", type=int, nargs="+", default=[1000, 10_000, 100_000])
    policies.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    (simulate_services if parsed.kind == "service" else compare_policies)(parsed)


def simulate_services(parsed: argparse.Namespace) -> None:
    workload = Workload(5 * 512 + 64, chunk_tokens=512, question_tokens=64)
    deployment = Deployment(SHAPES[parsed.shape], DEVICES[parsed.device], tier=TIERS[parsed.tier], kv_dtype="int8")
    base = Service(
        host_bytes=int(parsed.host_gb * 1e9),
        device_bytes=int(parsed.device_gb * 1e9),
        store_bytes=int(parsed.store_tb * 1e12),
        store_bytes_per_s=parsed.store_gb_per_s * 1e9,
        store_after=parsed.store_after,
        seed=parsed.seed,
    )
    known = [] if parsed.out is None or not parsed.out.exists() else parsed.out.read_text().splitlines()
    lines = [json.loads(line) for line in known]
    for replicas in parsed.replicas:
        for routing in parsed.routing if replicas > 1 else parsed.routing[:1]:
            service = replace(base, replicas=replicas, routing=routing)
            asked = asdict(service) | {name: getattr(parsed, name) for name in SETTINGS}
            if any(line["asked"] == asked for line in lines):
                continue
            line = json.dumps({"asked": asked} | simulate(parsed, service, workload, deployment))
            lines.append(json.loads(line))
            print(line, flush=True)
            if parsed.out is not None:
                with parsed.out.open("a") as out:
                    out.write(line + "\n")
    if parsed.plot is not None:
        drawn = [line for line in lines if asked | line["asked"] | {name: asked[name] for name in VARIED} == asked]
        scale_figure(drawn).savefig(parsed.plot, dpi=130)


def simulate(
    parsed: argparse.Namespace, service: Service, workload: Workload, deployment: Deployment
) -> dict[str, Any]:
    """Simulates one service; returns what is reported of it."""
    if service.routing == "random" and service.replicas > parsed.sample:
        part = parsed.sample / service.replicas
        # The store that all share has its price and its size, whoever of them is looked at.
        service = replace(service, replicas=parsed.sample, store_bytes_per_s=part * service.store_bytes_per_s)
    else:
        part = 1.0
    costs, size = estimated_costs(workload, deployment), chunk_bytes(deployment.config, 512, "int8")
    rate, drawing = service.replicas * parsed.requests_per_s, {"exponent": parsed.exponent}
    trace = zipf_trace(service.replicas * parsed.requests_per_replica, requests_per_s=rate, seed=parsed.seed, **drawing)
    simulation, began = Simulation(service, costs, size), time.process_time()
    if parsed.earlier_requests:
        simulation.fill_store(zipf_trace(parsed.earlier_requests, seed=parsed.seed + 1, **drawing).chunks.ravel())
    outcome = simulation.run(trace)
    full_s = costs((0, 0, 0, 5)).ttft_s
    priced = replace(service, store_bytes=round(part * service.store_bytes))
    return {
        "cpu_s": round(time.process_time() - began, 1),
        "simulated": {"replicas": service.replicas, "requests": trace.num_requests},
        "found": {place: round(outcome.share(place), 4) for place in PLACES},
        "ttft_s": simulated_percentiles(outcome, service, size, rate),
        "busy_share": round(outcome.busy_share, 3),
        "busiest_share": round(outcome.busiest_share, 3),
        "store_gb_per_s": round(outcome.reads * size * rate / part / 1e9, 2),
        "usd_per_million": round(million_requests_cost(outcome, priced, deployment, rate), 2),
        "full_ttft_s": queue_percentiles(full_s, parsed.requests_per_s, parsed.seed),
        "full_usd_per_million": round(full_cost(full_s, deployment), 2),
    }


def simulated_percentiles(outcome: Outcome, service: Service, size: int, rate: float) -> dict[int, float] | None:
    """TTFT; `None` where more is asked of the replicas or of the store than they can do, and it grows without bound."""
    if outcome.busy_share > 0.98 or outcome.reads * size * rate >= service.store_bytes_per_s:
        return None
    return {percent: round(outcome.ttft_percentile(percent), 4) for percent in (50, 90, 99)}


def queue_percentiles(
    seconds: float, requests_per_s: float, seed: int, requests: int = 200_000
) -> dict[int, float] | None:
    """TTFT of full recompute: of one replica that takes as long for every request, and never stores anything.

    `None` where it can't keep up, and TTFT grows without bound.
    """
    if seconds * requests_per_s >= 1:
        return None
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / requests_per_s, requests))
    ends = seconds * np.arange(1, requests + 1)  # as if none waited for its arrival
    waited = np.maximum.accumulate(arrivals - (ends - seconds))
    return {percent: round(float(np.percentile(ends + waited - arrivals, percent)), 4) for percent in (50, 90, 99)}


def full_cost(seconds: float, deployment: Deployment) -> float:
    """US dollars a million requests that take so long each, on replicas that are busy for as much of the time."""
    return 1e6 * seconds / PRICED_LOAD * deployment.device.price_per_hour * deployment.num_devices / 3600


def compare_policies(parsed: argparse.Namespace) -> None:
    """Prints hit rates in percent, of the second half of each trace, by the capacity in units of the sizes."""
    random, uses = np.random.default_rng(parsed.seed), parsed.uses
    traces = {f"Zipf {exponent}": zipf_keys(random, uses, CHUNKS, exponent) for exponent in (0.7, 0.9, 1.1)}
    traces["Zipf 0.9 with scans"] = with_scans(random, zipf_keys(random, int(0.7 * uses), CHUNKS, 0.9))
    drifting = [(zipf_keys(random, uses // 10, CHUNKS, 0.9) + 50 * step) % CHUNKS for step in range(10)]
    traces["Zipf 0.9 drifting"] = np.concatenate(drifting)
    for form, choices, scale in (("of size 1", [1], 1), ("of sizes 1, 2 and 4", [1, 2, 4], 2)):
        print(f"entries {form}: " + ", ".join([*POLICIES, *(["Belady"] if len(choices) == 1 else [])]))
        for name, keys in traces.items():
            sizes = np.random.default_rng(1).choice(choices, int(keys.max()) + 1)
            for capacity in (scale * each for each in parsed.capacities):
                hits = [policy(keys, sizes, capacity) for policy in POLICIES.values()]
                hits += [belady_hits(keys, capacity)] if len(choices) == 1 else []
                shares = [f"{100 * each[keys.size // 2 :].mean():6.1f}" for each in hits]
                print(f"{name:22}{capacity:8}" + "".join(shares), flush=True)


if __name__ == "__main__":
    main()
