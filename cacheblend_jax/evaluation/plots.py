"""Pictures of an evaluation: quality against ratio, deviation by layer, and where in a prompt the KV deviates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.insights import TOP_SHARE, concentration, neighbour_correlation
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.evaluation.summary import of_all_kinds

SELECTOR_COLOURS = {"hkvd": "C0", "cross": "C1", "query": "C2", "epic": "C4", "random": "C7", "oracle": "C3"}
CURVES = {
    "exact_match": "answers right",
    "kl": "KL from full recompute (nats a token)",
    "attention_deviation": "attention deviation",
}


def draw(
    directory: Path, settings: Sequence[Setting], summary: Sequence[dict[str, Any]], deviation: np.ndarray
) -> list[Path]:
    """Draws an evaluation's pictures into `directory`, which is made if missing; returns the files.

    Args:
        settings: those of the summary; the ones of mode `blend` become points of curves over the ratio.
        summary: what `summarize` returned.
        deviation: of one prompt's stand-alone KV, `[layers, candidates]`: see `insights.standalone_deviation`.

    Raises:
        CacheBlendError: matplotlib is missing, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheBlendError(f"cannot make --plot {directory}: {error.strerror}") from error
    lines = of_all_kinds(summary)
    drawn = [
        _quality_curves(directory / "quality.png", settings, lines),
        _heat_map(directory / "deviation.png", deviation),
        _insights(directory / "insights.png", deviation),
    ]
    if any(line["recovered"] is not None for line in lines.values()):
        drawn.append(_recovered_curves(directory / "recovered.png", settings, lines))
    if any("kv_deviation_by_layer" in line for line in lines.values()):
        drawn.append(_deviation_by_layer(directory / "layers.png", lines))
    return drawn


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CacheBlendError(f"--plot needs matplotlib: pip install 'cacheblend-jax[plots]' ({error})") from error
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise CacheBlendError(f"cannot write {path}: {error.strerror}") from error
    return path


def _quality_curves(path: Path, settings: Sequence[Setting], lines: dict[str, dict[str, Any]]) -> Path:
    """Each measure against the recompute ratio: a curve for each selector, levels for `full` and `reuse`."""
    curves = {measure: title for measure, title in CURVES.items() if all(_measured(lines, measure))}
    figure, axes = _figure(len(curves), (4.2 * len(curves), 3.4))
    for axis, (measure, title) in zip(axes, curves.items(), strict=True):
        for name, own in _by_curve(settings).items():
            ratios = [setting.ratio for setting in own]
            values = [lines[setting.label][measure] for setting in own]
            # Only a selector's usual settings have its colour; any others take matplotlib's next one.
            (drawn,) = axis.plot(ratios, values, "o-", label=name, color=SELECTOR_COLOURS.get(name))
            if measure == "exact_match":
                low, high = zip(*(lines[setting.label]["exact_match_interval"] for setting in own), strict=True)
                axis.fill_between(ratios, low, high, alpha=0.15, color=drawn.get_color())
        for mode, style in (("full", "--"), ("reuse", ":")):
            if mode in lines:
                axis.axhline(lines[mode][measure], color="black", linestyle=style, linewidth=1, label=mode)
        axis.set(xlabel="recompute ratio", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return _save(figure, path)


def _measured(lines: dict[str, dict[str, Any]], measure: str) -> list[bool]:
    return [line.get(measure) is not None for line in lines.values()]


def _by_curve(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Returns the settings that blend, by the curve they are points of, each in the order of its ratios."""
    curves: dict[str, list[Setting]] = {}
    for setting in sorted((each for each in settings if each.mode == "blend"), key=lambda setting: setting.ratio):
        curves.setdefault(setting.name, []).append(setting)
    return {name: curves[name] for name in dict.fromkeys(each.name for each in settings if each.name in curves)}


def _recovered_curves(path: Path, settings: Sequence[Setting], lines: dict[str, dict[str, Any]]) -> Path:
    """The share of full KV reuse's loss that each setting recovers, against the work that its prefill takes."""
    figure, (axis,) = _figure(1, (6.4, 4.2))
    whole = lines["full"]["flops"] if "full" in lines else 1e9
    for name, own in _by_curve(settings).items():
        points = [lines[setting.label] for setting in own]
        work = [line["flops"] / whole for line in points]
        low, high = np.transpose([line["recovered_interval"] for line in points])
        (drawn,) = axis.plot(
            work, [line["recovered"] for line in points], "o-", label=name, color=SELECTOR_COLOURS.get(name)
        )
        axis.fill_between(work, low, high, alpha=0.15, color=drawn.get_color())
    for mode, style in (("full", "--"), ("reuse", ":")):
        if mode in lines:
            axis.axhline(lines[mode]["recovered"], color="black", linestyle=style, linewidth=1, label=mode)
    axis.set(
        xlabel="FLOPs of the prefill, full recompute = 1" if "full" in lines else "GFLOPs of the prefill",
        ylabel="share of full KV reuse's KL recovered",
        title="quality recovered against work (bands: 95 % intervals)",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return _save(figure, path)


def _deviation_by_layer(path: Path, lines: dict[str, dict[str, Any]]) -> Path:
    """KV and attention deviation by layer: a line for each setting but `full`, which has none."""
    figure, axes = _figure(2, (9.5, 3.6))
    for axis, measure in zip(axes, ("kv_deviation_by_layer", "attention_deviation_by_layer"), strict=True):
        for label, line in lines.items():
            if label != "full":
                axis.plot(line[measure], "o-", markersize=3, label=label)
        axis.set(xlabel="layer", title=measure.removesuffix("_by_layer").replace("_", " ").replace("kv", "KV"))
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _heat_map(path: Path, deviation: np.ndarray) -> Path:
    """Deviation of each token (across) at each layer (down): few columns light up, the same in all layers."""
    figure, (axis,) = _figure(1, (10.0, 2.8))
    image = axis.imshow(np.sqrt(deviation), aspect="auto", cmap="magma", interpolation="nearest")
    axis.set(xlabel="token", ylabel="layer", title="deviation of stand-alone KV from full recompute (square root)")
    figure.colorbar(image, ax=axis)
    return _save(figure, path)


def _insights(path: Path, deviation: np.ndarray) -> Path:
    """CacheBlend's figures 7 and 8: few tokens hold most of the deviation, and neighbouring layers agree on which."""
    figure, (left, right) = _figure(2, (9.0, 3.4))
    tokens = np.arange(1, deviation.shape[1] + 1) / deviation.shape[1]
    for layer in range(1, len(deviation)):
        held = np.cumsum(np.sort(deviation[layer])[::-1])
        if held[-1] > 0:
            left.plot(tokens, held / held[-1], label=f"layer {layer}", color=f"C{layer % 10}")
    left.axvline(TOP_SHARE, color="black", linewidth=1, linestyle=":")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1)
    highest = np.nanmean(concentration(deviation)[1:])
    left.set(
        xlabel="share of tokens, highest first",
        ylabel="share of the deviation",
        title=f"top {TOP_SHARE:.0%} hold {highest:.0%} on average",
    )
    left.legend(fontsize="x-small")
    right.bar(range(1, len(deviation) - 1), neighbour_correlation(deviation[1:]))
    right.set(xlabel="layer", title="rank correlation with the next layer", ylim=(0, 1))
    return _save(figure, path)
