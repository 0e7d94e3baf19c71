"""The picture of simulated services: where chunks are found, TTFT and cost, from one replica to a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cacheblend_jax.evaluation.figures import BLACK, BLUE, GREY, VERMILION, Figure, new_figure

STYLES: dict[str, dict[str, Any]] = {
    "chunks": {"color": BLUE, "marker": "o"},
    "random": {"color": VERMILION, "marker": "s", "fillstyle": "none"},
}
NAMES = {"chunks": "routed by chunk", "random": "routed at random"}


def scale_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """Draws services side by side, by their number of replicas and their routing; else they are alike.

    A TTFT that grows without bound is left out.

    Args:
        lines: as `scripts/simulate_scale.py service --out` writes them.
    """
    figure, axes = new_figure((11, 3.9), 1, 3)
    found, ttft, cost = axes[0]
    for routing, style in STYLES.items():
        own = [line for line in lines if line["asked"]["routing"] == routing or line["asked"]["replicas"] == 1]
        own = sorted(own, key=lambda line: line["asked"]["replicas"])
        replicas = [line["asked"]["replicas"] for line in own]
        memory = [100 * (line["found"]["device"] + line["found"]["host"]) for line in own]
        found.plot(replicas, memory, label=f"in memory, {NAMES[routing]}", **style)
        stable = [line for line in own if line["ttft_s"] is not None]
        for percent, dashes in (("50", "-"), ("99", "--")):
            label = f"{'median' if percent == '50' else '99 of 100'}, {NAMES[routing]}"
            values = [1000 * line["ttft_s"][percent] for line in stable]
            ttft.plot([line["asked"]["replicas"] for line in stable], values, linestyle=dashes, label=label, **style)
        cost.plot(replicas, [line["usd_per_million"] for line in own], label=NAMES[routing], **style)
    anywhere = {line["asked"]["replicas"]: 100 * (1 - line["found"]["none"]) for line in lines}
    found.plot(*zip(*sorted(anywhere.items()), strict=True), color=GREY, marker="^", label="anywhere")
    if (full_ttft := lines[0]["full_ttft_s"]) is not None:
        for percent, dots in (("50", ":"), ("99", "-.")):
            label = f"{'median' if percent == '50' else '99 of 100'}, full recompute"
            ttft.axhline(1000 * full_ttft[percent], color=BLACK, linestyle=dots, label=label)
    cost.axhline(lines[0]["full_usd_per_million"], color=BLACK, linestyle=":", label="full recompute")
    counts = sorted(anywhere)
    for axis, title in ((found, "look-ups found, %"), (ttft, "TTFT, ms"), (cost, "US dollars a million requests")):
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("replicas")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=9)
    return figure
