"""The summary of an evaluation: means over the rows, by setting and by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cacheblend_jax.evaluation.metrics import bootstrap_interval

MEANS = ("exact_match", "f1", "rouge_l", "kl", "top1", "kv_deviation", "attention_deviation", "ttft_s", "recomputed")
WITH_INTERVAL = ("exact_match", "f1")
BY_LAYER = ("kv_deviation_by_layer", "attention_deviation_by_layer")


def summarize(records: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Averages records (see `Evaluator.evaluate_row`) over rows.

    Args:
        labels: of the settings, in the order wanted; those without records are left out.

    Returns:
        A line for each setting and kind of question, the kind `"all"` first: `setting`, `kind`, `rows` (their number),
        the mean of every measure (of `ttft_s` the median), `exact_match_interval` and `f1_interval` (95 %, bootstrap),
        and the deviations by layer.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["setting"], "all"].append(record)
        if record["kind"]:
            groups[record["setting"], record["kind"]].append(record)
    kinds = list(dict.fromkeys(kind for _, kind in groups))
    return [
        {"setting": label, "kind": kind, "rows": len(group)} | _averages(group)
        for label in labels
        for kind in kinds
        if (group := groups.get((label, kind)))
    ]


def of_all_kinds(summary: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the lines over all kinds of question, by the setting's label."""
    return {line["setting"]: line for line in summary if line["kind"] == "all"}


def _averages(group: list[dict[str, Any]]) -> dict[str, Any]:
    averages: dict[str, Any] = {name: _mean([record[name] for record in group]) for name in MEANS}
    averages["ttft_s"] = float(np.median([record["ttft_s"] for record in group]))
    for name in WITH_INTERVAL:
        averages[f"{name}_interval"] = bootstrap_interval([record[name] for record in group])
    for name in BY_LAYER:
        averages[name] = np.mean([record[name] for record in group], axis=0).tolist()
    return averages


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(np.asarray(values, np.float64)))
