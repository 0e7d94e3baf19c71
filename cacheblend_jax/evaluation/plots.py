"""Pictures of an evaluation: quality against ratio, deviation by layer, and where in a prompt the KV deviates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.insights import TOP_SHARE, concentration, neighbour_correlation
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.evaluation.summary import of_all_kinds

SELECTOR_COLOURS = {"hkvd": "C0", "cross": "C1", "query": "C2", "epic": "C4", "random": "C7", "oracle": "C3"}
CURVES = {
    "exact_match": "answers right (bands: 95 % intervals)",
    "kl": "KL from full recompute (nats a token)",
    "attention_deviation": "attention deviation",
}


def draw(
    directory: Path,
    settings: Sequence[Setting],
    summary: Sequence[dict[str, Any]],
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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheBlendError(f"cannot make --plot {directory}: {error.strerror}") from error
    lines = of_all_kinds(summary)
    drawn = [
        _quality_curves(directory / "quality.png", settings, lines),
        _heat_map(directory / "deviation.png", deviation, chunk_lengths),
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


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """Returns a colour of its own for each name: a selector's usual one, or one that no other of them has."""
    usual = {name: SELECTOR_COLOURS[name] for name in names if name in SELECTOR_COLOURS}
    others = [name for name in names if name not in usual]
    free = [colour for colour in (f"C{i}" for i in range(10)) if colour not in usual.values()]
    if len(others) <= len(free):
        return usual | dict(zip(others, free, strict=False))
    from matplotlib import colormaps

    return dict(zip(names, colormaps["turbo"](np.linspace(0, 1, len(names))), strict=True))


def _whole_numbers(axis: Any) -> None:
    """Puts ticks at whole layers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _quality_curves(path: Path, settings: Sequence[Setting], lines: dict[str, dict[str, Any]]) -> Path:
    """Each measure against the recompute ratio: a curve for each selector, levels for `full` and `reuse`."""
    curves = {measure: title for measure, title in CURVES.items() if all(_measured(lines, measure))}
    figure, axes = _figure(len(curves), (4.2 * len(curves), 3.4))
    points = _by_curve(settings)
    colours = _colours(list(points))
    for axis, (measure, title) in zip(axes, curves.items(), strict=True):
        for name, own in points.items():
            ratios = [setting.ratio for setting in own]
            values = [lines[setting.label][measure] for setting in own]
            axis.plot(ratios, values, "o-", label=name, color=colours[name])
            if measure == "exact_match":
                low, high = zip(*(lines[setting.label]["exact_match_interval"] for setting in own), strict=True)
                axis.fill_between(ratios, low, high, alpha=0.15, color=colours[name])
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
    colours = _colours(list(_by_curve(settings)))
    for name, own in _by_curve(settings).items():
        points = [lines[setting.label] for setting in own]
        work = [line["flops"] / whole for line in points]
        low, high = np.transpose([line["recovered_interval"] for line in points])
        axis.plot(work, [line["recovered"] for line in points], "o-", label=name, color=colours[name])
        axis.fill_between(work, low, high, alpha=0.15, color=colours[name])
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
    figure, axes = _figure(2, (10.5, 3.8))
    drawn = [label for label in lines if label != "full"]
    colours = _colours(drawn)
    panels = {
        "kv_deviation_by_layer": ("KV deviation", "squared distance, relative (mean over tokens)"),
        "attention_deviation_by_layer": ("attention deviation", "distance of the question's attention, relative"),
    }
    for axis, (measure, (title, unit)) in zip(axes, panels.items(), strict=True):
        for label in drawn:
            axis.plot(lines[label][measure], "o-", markersize=3, label=label, color=colours[label])
        axis.set(xlabel="layer", ylabel=unit, title=f"{title} from full recompute")
        _whole_numbers(axis.xaxis)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _heat_map(path: Path, deviation: np.ndarray, chunk_lengths: Sequence[int]) -> Path:
    """Deviation of each token (across) at each layer (down): few columns light up, the same in all layers."""
    figure, (axis,) = _figure(1, (10.0, 3.0))
    image = axis.imshow(np.sqrt(deviation), aspect="auto", cmap="magma", interpolation="nearest")
    axis.set(
        xlabel="token of the chunks (lines: where one begins; above: its number)",
        ylabel="layer",
    )
    axis.set_title("How far stand-alone KV is from full recompute", pad=16)  # room for the chunks' numbers
    _whole_numbers(axis.xaxis)
    _whole_numbers(axis.yaxis)
    # Chunks that are exact where they stand lead the prompt and are no candidates: hence counted from the end.
    ends = deviation.shape[1] - np.cumsum([0, *chunk_lengths[::-1]])[::-1]
    spans = [(i, begin, end) for i, (begin, end) in enumerate(pairwise(ends.tolist())) if begin >= 0]
    for number, begin, end in spans:
        if begin > 0:
            axis.axvline(begin - 0.5, color="white", linewidth=0.8)
        middle = (begin + end - 1) / 2
        axis.annotate(str(number), (middle, 1), (0, 2), axis.get_xaxis_transform(), "offset points", ha="center")
    figure.colorbar(image, ax=axis, label="square root of the deviation")
    return _save(figure, path)


def _insights(path: Path, deviation: np.ndarray) -> Path:
    """CacheBlend's figures 7 and 8: few tokens hold most of the deviation, and neighbouring layers agree on which."""
    figure, (left, right) = _figure(2, (11.5, 3.8))
    from matplotlib import colormaps  # it is there: `_figure` names it where it is missing
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    tokens = np.arange(1, deviation.shape[1] + 1) / deviation.shape[1]
    scale = ScalarMappable(Normalize(1, max(len(deviation) - 1, 2)), colormaps["viridis"])
    shades = scale.cmap(np.linspace(0, 1, len(deviation) - 1))
    for layer in range(1, len(deviation)):
        held = np.cumsum(np.sort(deviation[layer])[::-1])
        if held[-1] > 0:
            left.plot(tokens, held / held[-1], color=shades[layer - 1])
    left.axvline(TOP_SHARE, color="black", linewidth=1, linestyle=":", label=f"top {TOP_SHARE:.0%}")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, label="an even spread")
    highest = np.nanmean(concentration(deviation)[1:])
    left.set(
        xlabel="share of tokens, those that deviate most first",
        ylabel="share of the layer's KV deviation",
        title=f"The top {TOP_SHARE:.0%} of tokens hold {highest:.0%} of the deviation",
    )
    left.legend(fontsize="small", loc="lower right")
    _whole_numbers(figure.colorbar(scale, ax=left, label="layer").ax.yaxis)
    correlation = neighbour_correlation(deviation[1:])
    known = correlation[np.isfinite(correlation)]
    mean = f": {known.mean():.2f} on average" if known.size else ""
    right.bar(range(1, len(deviation) - 1), correlation)
    right.set(
        xlabel="layer",
        ylabel="rank correlation with the next layer",
        title=f"Agreement of neighbouring layers{mean}",
        ylim=(known.min(initial=0.0), 1),
    )
    _whole_numbers(right.xaxis)
    right.grid(axis="y", alpha=0.3)
    return _save(figure, path)
