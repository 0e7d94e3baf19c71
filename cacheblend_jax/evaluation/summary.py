"""The summary of an evaluation: means over the rows, by setting and by kind of question, with paired intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.metrics import bootstrap_interval

OF_ANSWER = ("exact_match", "f1", "rouge_l")
OF_DISTANCE = ("kl", "first_kl", "nll_difference", "agreement", "kv_deviation", "attention_deviation")
MEANS = (*OF_ANSWER, *OF_DISTANCE, "ttft_s", "flops", "recomputed")
WITH_INTERVAL = ("exact_match", "f1", "kl", "nll_difference")
BY_LAYER = ("kv_deviation_by_layer", "attention_deviation_by_layer")


def summarize(
    records: Sequence[dict[str, Any]], labels: Sequence[str], against: str | None = None
) -> list[dict[str, Any]]:
    """Averages records (see `Evaluator.evaluate_row`) over rows.

    Intervals are of 95 %, by bootstrap over rows; where two settings are compared, their results on a row are drawn
    together. (Full recompute's KL is zero, so that the interval of a setting's own KL compares it with `full`.)

    Args:
        labels: of the settings, in the order wanted; those without records are left out.
        against: the label of a setting that all others are compared with.

    Returns:
        A line for each setting and kind of question, the kind `"all"` first: `setting`, `kind`, `rows` (their number);
        the mean of every measure (of `ttft_s` the median), `None` for what was not measured; `…_interval` of
        `WITH_INTERVAL`; the deviations by layer; `recovered`, the share of full KV reuse's KL that the setting is rid
        of, with its interval, `None` without the setting `reuse`; with `against`, `kl_difference` from that setting
        and its interval.

    Raises:
        CacheBlendError: no setting has the label `against`.
    """
    if against is not None and against not in labels:
        raise CacheBlendError(f"--against {against!r} is none of the settings: {', '.join(labels)}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["setting"], "all"].append(record)
        if record["kind"]:
            groups[record["setting"], record["kind"]].append(record)
    kinds = list(dict.fromkeys(kind for _, kind in groups))
    lines = []
    for label in labels:
        for kind in kinds:
            if group := groups.get((label, kind)):
                line = {"setting": label, "kind": kind, "rows": len(group)} | _averages(group)
                line |= _recovered(group, groups.get(("reuse", kind), []))
                if against is not None:
                    line |= _difference(group, groups[against, kind])
                lines.append(line)
    return lines


def of_all_kinds(summary: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the lines over all kinds of question, by the setting's label."""
    return {line["setting"]: line for line in summary if line["kind"] == "all"}


def _averages(group: list[dict[str, Any]]) -> dict[str, Any]:
    averages: dict[str, Any] = {name: _mean([record.get(name) for record in group]) for name in MEANS}
    averages["ttft_s"] = float(np.median([record["ttft_s"] for record in group]))
    for name in WITH_INTERVAL:
        averages[f"{name}_interval"] = bootstrap_interval([record[name] for record in group])
    for name in BY_LAYER:
        if all(name in record for record in group):
            averages[name] = np.mean([record[name] for record in group], axis=0).tolist()
    return averages


def _recovered(group: list[dict[str, Any]], reuse: list[dict[str, Any]]) -> dict[str, Any]:
    own, lost = _paired_kl(group, reuse)
    if own.size == 0 or lost.mean() == 0:
        return {"recovered": None, "recovered_interval": None}

    def recovered(own: np.ndarray, lost: np.ndarray, axis: int) -> Any:
        return 1 - own.mean(axis) / np.maximum(lost.mean(axis), np.finfo(np.float64).tiny)

    return {
        "recovered": float(recovered(own, lost, axis=0)),
        "recovered_interval": bootstrap_interval(own, lost, statistic=recovered),
    }


def _difference(group: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    difference = np.subtract(*_paired_kl(group, other))
    if difference.size == 0:
        return {"kl_difference": None, "kl_difference_interval": None}
    return {"kl_difference": float(difference.mean()), "kl_difference_interval": bootstrap_interval(difference)}


def _paired_kl(group: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns both settings' KL on the rows that both have, each `[rows]`."""
    by_row = {record["row"]: record["kl"] for record in other}
    pairs = [(record["kl"], by_row[record["row"]]) for record in group if record["row"] in by_row]
    first, second = np.asarray(pairs, np.float64).reshape(-1, 2).T
    return first, second


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(np.asarray(values, np.float64)))
