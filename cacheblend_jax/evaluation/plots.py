"""Pictures of an evaluation: quality against ratio and against work, and deviation by layer.

Each function returns a figure, which a notebook shows and `figure.savefig` saves; `draw` saves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.evaluation.deviation_plots import deviation_insights, deviation_map
from cacheblend_jax.evaluation.figures import (
    Figure,
    new_figure,
    save_figures,
    styles_of,
    whole_numbers,
)
from cacheblend_jax.evaluation.parts import Part
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.evaluation.summary import of_all_kinds

Summary = Sequence[dict[str, Any]]
CURVES = {
    "exact_match": "answers right (bands: 95 % intervals)",
    "kl": "KL from full recompute (nats a token)",
    "attention_deviation": "attention deviation",
}
LEVELS = {"full": "--", "reuse": ":"}


def draw(
    directory: Path,
    settings: Sequence[Setting],
    summary: Summary,
    deviation: np.ndarray,
    chunk_lengths: Sequence[int],
) -> list[Path]:
    """Draws an evaluation's pictures into `directory`, which is made if missing; returns the files.

    Args:
        settings: those of the summary; the ones of mode `blend` become points of curves over the ratio.
        summary: what `summarize` returned.
        deviation: of one prompt's stand-alone KV, `[layers, candidates]`: see `insights.standalone_deviation`.
        chunk_lengths: the tokens of each of that prompt's chunks.

    Raises:
        CacheBlendError: matplotlib is missing, or the directory cannot be written.
    """
    figures = {
        "quality": quality_by_ratio(settings, summary),
        "deviation": deviation_map(deviation, _last_chunks(chunk_lengths, deviation.shape[1])),
        "insights": deviation_insights(deviation),
    }
    lines = of_all_kinds(summary).values()
    if any(line["recovered"] is not None for line in lines):
        figures["recovered"] = recovered_by_work(settings, summary)
    if any("kv_deviation_by_layer" in line for line in lines):
        figures["layers"] = deviation_by_layer(summary)
    return save_figures(directory, figures)


def quality_by_ratio(settings: Sequence[Setting], summary: Summary) -> Figure:
    """Draws each measure against the recompute ratio: a curve for each selector, levels for `full` and `reuse`.

    Measures are those of `CURVES` that every line of the summary has. Source: CacheBlend, figure 16.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    lines = of_all_kinds(summary)
    curves = {measure: title for measure, title in CURVES.items() if all(_measured(lines, measure))}
    figure, axes = new_figure((4.2 * len(curves), 3.4), columns=len(curves))
    points = _by_curve(settings)
    styles = styles_of(list(points))
    for axis, (measure, title) in zip(axes[0], curves.items(), strict=True):
        for name, own in points.items():
            ratios = [setting.ratio for setting in own]
            values = [lines[setting.label][measure] for setting in own]
            axis.plot(ratios, values, label=name, **styles[name])
            if measure == "exact_match":
                low, high = zip(*(lines[setting.label]["exact_match_interval"] for setting in own), strict=True)
                axis.fill_between(ratios, low, high, alpha=0.15, color=styles[name]["color"])
        _draw_levels(axis, lines, measure)
        axis.set(xlabel="recompute ratio", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return figure


def recovered_by_work(settings: Sequence[Setting], summary: Summary) -> Figure:
    """Draws the share of full KV reuse's loss that each setting recovers, against the work that its prefill takes.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    lines = of_all_kinds(summary)
    figure, axes = new_figure((6.4, 4.2))
    axis = axes[0, 0]
    whole = lines["full"]["flops"] if "full" in lines else 1e9
    points = _by_curve(settings)
    styles = styles_of(list(points))
    for name, own in points.items():
        of_own = [lines[setting.label] for setting in own]
        work = [line["flops"] / whole for line in of_own]
        low, high = np.transpose([line["recovered_interval"] for line in of_own])
        axis.plot(work, [line["recovered"] for line in of_own], label=name, **styles[name])
        axis.fill_between(work, low, high, alpha=0.15, color=styles[name]["color"])
    _draw_levels(axis, lines, "recovered")
    axis.set(
        xlabel="FLOPs of the prefill, full recompute = 1" if "full" in lines else "GFLOPs of the prefill",
        ylabel="share of full KV reuse's KL recovered",
        title="quality recovered against work (bands: 95 % intervals)",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def deviation_by_layer(summary: Summary) -> Figure:
    """Draws KV and attention deviation by layer: a line for each setting but `full`, which has none.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    lines = of_all_kinds(summary)
    figure, axes = new_figure((10.5, 3.8), columns=2)
    drawn = [label for label in lines if label != "full"]
    styles = styles_of(drawn)
    panels = {
        "kv_deviation_by_layer": ("KV deviation", "squared distance, relative (mean over tokens)"),
        "attention_deviation_by_layer": ("attention deviation", "distance of the question's attention, relative"),
    }
    for axis, (measure, (title, unit)) in zip(axes[0], panels.items(), strict=True):
        for label in drawn:
            axis.plot(lines[label][measure], markersize=3, label=label, **styles[label])
        axis.set(xlabel="layer", ylabel=unit, title=f"{title} from full recompute")
        whole_numbers(axis.xaxis)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_levels(axis: Any, lines: dict[str, dict[str, Any]], measure: str) -> None:
    for mode, style in LEVELS.items():
        if mode in lines:
            axis.axhline(lines[mode][measure], color="black", linestyle=style, linewidth=1, label=mode)


def _measured(lines: dict[str, dict[str, Any]], measure: str) -> list[bool]:
    return [line.get(measure) is not None for line in lines.values()]


def _by_curve(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Returns the settings that blend, by the curve they are points of, each in the order of its ratios."""
    curves: dict[str, list[Setting]] = {}
    for setting in sorted((each for each in settings if each.mode == "blend"), key=lambda setting: setting.ratio):
        curves.setdefault(setting.name, []).append(setting)
    return {name: curves[name] for name in dict.fromkeys(each.name for each in settings if each.name in curves)}


def _last_chunks(chunk_lengths: Sequence[int], candidates: int) -> list[Part]:
    """Returns the chunks that the candidates are in, by their numbers.

    Chunks that are exact where they stand lead the prompt and are no candidates: hence counted from the end.
    """
    ends = candidates - np.cumsum([0, *chunk_lengths[::-1]])[::-1]
    parts = [Part(str(number), *span) for number, span in enumerate(pairwise(ends.tolist()))]
    return [part for part in parts if part.start >= 0]
