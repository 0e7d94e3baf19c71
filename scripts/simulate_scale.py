"""Simulates services of 1 to 1,000 replicas over the store's own policies, and compares those with others.

    python scripts/simulate_scale.py service --out service.jsonl --plot docs/scale.png
    python scripts/simulate_scale.py policies

A service of a million requests takes about a minute or two of one core. Lines that --out has already are not run again.
See docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from cacheblend_jax.evaluation.cache_policies import POLICIES, belady_hits
from cacheblend_jax.evaluation.capacity import Deployment, Workload, chunk_bytes
from cacheblend_jax.evaluation.devices import DEVICES
from cacheblend_jax.evaluation.scale_plot import scale_figure
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.simulated_service import (
    PLACES,
    ROUTINGS,
    Service,
    Simulation,
    estimated_costs,
    million_requests_cost,
)
from cacheblend_jax.evaluation.traces import with_scans, zipf_keys, zipf_trace

CHUNKS = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    service = kinds.add_parser("service")
    service.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100, 1000])
    service.add_argument("--routing", choices=ROUTINGS, nargs="+", default=ROUTINGS)
    service.add_argument("--requests", type=int, default=500_000)
    service.add_argument("--exponent", type=float, default=0.9)
    service.add_argument("--requests-per-s", type=float, default=8.0, help="for each replica")
    service.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    service.add_argument("--device", choices=sorted(DEVICES), default="H100")
    service.add_argument("--host-gb", type=float, default=64.0)
    service.add_argument("--device-gb", type=float, default=8.0)
    service.add_argument("--store-tb", type=float, default=10.0)
    service.add_argument("--store-gb-per-s", type=float, default=500.0, help="of all replicas together")
    service.add_argument("--store-after", type=int, default=1, help="misses of a chunk")
    service.add_argument("--seed", type=int, default=0)
    service.add_argument("--out", type=Path, help="a JSON line for each service")
    service.add_argument("--plot", type=Path, help="draws what --out has")
    policies = kinds.add_parser("policies")
    policies.add_argument("--uses", type=int, default=300_000)
    policies.add_argument("--capacities", type=int, nargs="+", default=[1000, 10_000, 100_000])
    policies.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    (simulate_services if parsed.kind == "service" else compare_policies)(parsed)


def simulate_services(parsed: argparse.Namespace) -> None:
    workload = Workload(5 * 512 + 64, chunk_tokens=512, question_tokens=64)
    deployment = Deployment(SHAPES[parsed.shape], DEVICES[parsed.device], kv_dtype="int8")
    costs, size = estimated_costs(workload, deployment), chunk_bytes(deployment.config, 512, "int8")
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
        rate = replicas * parsed.requests_per_s
        for routing in parsed.routing if replicas > 1 else parsed.routing[:1]:
            service = replace(base, replicas=replicas, routing=routing)
            asked = asdict(service) | {"requests": parsed.requests, "exponent": parsed.exponent, "requests_per_s": rate}
            if any(line["asked"] == asked for line in lines):
                continue
            trace = zipf_trace(parsed.requests, exponent=parsed.exponent, requests_per_s=rate, seed=parsed.seed)
            began = time.process_time()
            outcome = Simulation(service, costs, size).run(trace)
            line = {
                "asked": asked,
                "cpu_s": round(time.process_time() - began, 1),
                "found": {place: round(outcome.share(place), 4) for place in PLACES},
                "ttft_s": {percent: round(outcome.ttft_percentile(percent), 4) for percent in (50, 90, 99)},
                "busy_share": round(outcome.busy_share, 3),
                "busiest_share": round(outcome.busiest_share, 3),
                "usd_per_million": round(million_requests_cost(outcome, service, deployment, rate), 2),
                "full_ttft_s": queue_percentiles(costs((0, 0, 0, 5)).ttft_s, parsed.requests_per_s, parsed.seed),
            }
            lines.append(json.loads(json.dumps(line)))
            print(json.dumps(line), flush=True)
            if parsed.out is not None:
                with parsed.out.open("a") as out:
                    out.write(json.dumps(line) + "\n")
    if parsed.plot is not None:
        scale_figure(lines).savefig(parsed.plot, dpi=130)


def queue_percentiles(seconds: float, requests_per_s: float, seed: int, requests: int = 200_000) -> dict[int, float]:
    """TTFT of full recompute: of one replica that takes as long for every request, and never stores anything."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / requests_per_s, requests))
    ends = seconds * np.arange(1, requests + 1)  # as if none waited for its arrival
    waited = np.maximum.accumulate(arrivals - (ends - seconds))
    return {percent: round(float(np.percentile(ends + waited - arrivals, percent)), 4) for percent in (50, 90, 99)}


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
