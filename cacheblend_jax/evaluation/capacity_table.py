"""A capacity plan as text, in the terms of whoever pays for it."""

from __future__ import annotations

from cacheblend_jax.evaluation.capacity import CapacityPlan, ModePlan
from cacheblend_jax.evaluation.deployment import Deployment, Workload

NOT_PLANNED = "decoding and waiting behind other requests are not planned; scripts/simulate_scale.py simulates queues"


def capacity_table(name: str, workload: Workload, deployment: Deployment, plan: CapacityPlan) -> str:
    """Returns a plan for a model of that name, a block for each question that it answers."""
    tier, speed = deployment.tier, deployment.tier.bytes_per_s
    if deployment.reads_in_place(workload):
        speed = deployment.estimator().transfer.bytes_per_s
    lines = [
        f"{name} on {deployment.num_devices} x {deployment.device.name} a replica; {workload.requests_per_s:g} "
        f"requests/s of {workload.context:,} tokens: {workload.num_chunks} chunks of {workload.chunk_tokens}, "
        f"{workload.num_found} of them stored ({tier.name}: {speed / 1e9:.3g} GB/s)",
        f"estimated by {plan.estimated_by}",
        *_unsplit(deployment, plan),
        "",
        *_modes(plan),
        "",
        f"memory of each device, GB (weights in {plan.product_ways:.3g} parts, KV "
        f"{'whole on each' if plan.kv_ways == 1 else f'in {plan.kv_ways} parts'})",
        *_memory(plan),
        "",
        f"a chunk's KV: {', '.join(f'{size / 1e6:.1f} MB in {dtype}' for dtype, size in plan.chunk_bytes.items())}",
        f"{workload.stored_chunks:,} stored chunks: {plan.stored_bytes / 1e12:.2f} TB in {tier.name}, {_costs(plan)}",
        *_worth(workload, plan),
        f"not in it: {NOT_PLANNED}",
    ]
    return "\n".join(lines)


def _unsplit(deployment: Deployment, plan: CapacityPlan) -> list[str]:
    """A warning where devices repeat each other's work; weights that each device has anyway are less than a tenth."""
    if plan.product_ways > 0.9 * deployment.num_devices:
        return []
    return [
        f"warning: {deployment.num_devices} devices split a layer's products into {plan.product_ways:.3g} parts alone: "
        "its heads and MLP do not divide by more; choose another number of devices"
    ]


def _costs(plan: CapacityPlan) -> str:
    if plan.storage_cost is None or plan.device_cost is None:
        return "no costs, for a blend does not fit"
    copies = "one copy that all replicas share" if plan.copies == 1 else f"a copy in each of {plan.copies} replicas"
    return f"{copies}: ${plan.storage_cost:,.0f} a month; devices for blend: ${plan.device_cost:,.0f} a month"


def _modes(plan: CapacityPlan) -> list[str]:
    lines = [f"{'mode':8}{'ratio':>7}{'TTFT s':>9}{'compute s':>11}{'requests/s':>12}  {'replicas':>8}  binds"]
    for mode in plan.modes.values():
        ratio = "" if mode.ratio is None else f"{mode.ratio:g}"
        does = f"{mode.requests_per_s:12.2f}  {mode.replicas:8}" if mode.replicas else f"{'fits not':>12}  {'':8}"
        lines.append(f"{mode.mode:8}{ratio:>7}{mode.ttft_s:9.3f}{mode.compute_s:11.3f}{does}  {mode.binds}")
    return [*lines, "requests/s: of one replica"]


def _memory(plan: CapacityPlan) -> list[str]:
    titles = ("weights", "KV", "staging", "temporary", "others' KV", "tier", "total", "usable", "in flight")
    lines = [f"{'mode':8}" + "".join(f"{title:>11}" for title in titles)]
    for mode in plan.modes.values():
        sizes = "".join(f"{size / 1e9:11.2f}" for size in _sizes(mode))
        lines.append(f"{mode.mode:8}{sizes}{mode.memory.in_flight:11.1f}")
    return lines


def _sizes(mode: ModePlan) -> tuple[int, ...]:
    memory, program = mode.memory, mode.memory.program
    of_program = program.weights, program.kv, program.staging, program.temporaries
    return *of_program, memory.kv_in_flight, memory.device_tier, memory.total, memory.usable


def _worth(workload: Workload, plan: CapacityPlan) -> list[str]:
    worth = plan.worth
    lines = []
    if worth.stored is None:
        lines.append("in this prompt a blend is no faster than full recompute, however many of its chunks are stored")
    else:
        lines.append(
            f"in this prompt a blend is faster than full recompute from {worth.stored} stored chunks on, of "
            f"{workload.num_chunks}"
        )
    if worth.prompt is None:
        lines.append(f"where {workload.reuse:.0%} of the chunks are stored, it pays for no prompt")
    else:
        lines.append(
            f"where {workload.reuse:.0%} of the chunks are stored, it pays for prompts of {worth.prompt} to "
            f"{worth.longest} chunks"
        )
    return lines
