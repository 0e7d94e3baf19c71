"""Pictures of one prompt's KV deviation: of each token at each layer, and what the paper observes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from cacheblend_jax.evaluation.figures import VERMILION, Figure, new_figure, set_texts, whole_numbers
from cacheblend_jax.evaluation.insights import TOP_SHARE, concentration, neighbour_correlation
from cacheblend_jax.evaluation.parts import Part, shortened

MOST_WORDS = 130  # tokens that have their words along the axis, and a mark each
MOST_COLUMNS = 1200  # more tokens share columns: a picture has no more pixels
LONGEST_WORD, LONGEST_NAME = 18, 24
TOKEN_INCHES, LABEL_INCHES, CHARACTER_INCHES = 0.17, 0.17, 0.075


def deviation_map(
    deviation: Float[np.ndarray, "layers tokens"],
    chunks: Sequence[Part],
    *,
    words: Sequence[str] | None = None,
    recomputed: Bool[np.ndarray, "layers tokens"] | None = None,
    check_layer: int | None = None,
) -> Figure:
    """Draws the deviation of each token (across) at each layer (down): few columns light up, the same in all layers.

    Of up to 130 tokens each has its word below, and a dot where it was recomputed. Of more, a second map shows what was
    recomputed; of more than 1,200, neighbours share a column: the largest deviation, and the share recomputed.

    Args:
        deviation: of the chunks' stand-alone KV from full recompute.
        chunks: where each begins and ends, in columns of `deviation`.
        words: of each token.
        recomputed: which tokens' KV a blend computed afresh.
        check_layer: the layer where tokens were chosen; up to it, all are computed, and none is marked.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    num_layers, num_tokens = deviation.shape
    labels = words if num_tokens <= MOST_WORDS else None
    shares = recomputed if num_tokens > MOST_WORDS else None
    width = 13.0 if labels is None else min(max(TOKEN_INCHES * num_tokens + 2.2, 7.5), 24.5)
    rows, room = (1 if shares is None else 2), (1.5 if labels is None else 2.3)
    height = rows * min(max(0.16 * num_layers, 1.6), 5.0) + room
    figure, axes = new_figure((width, height), rows, sharex=True)
    per_column = -(-num_tokens // MOST_COLUMNS)
    scale = {"per_column": per_column, "num_tokens": num_tokens}
    shown = _show(axes[0, 0], _largest(np.sqrt(deviation), per_column), **scale, cmap="magma")
    figure.colorbar(shown, ax=axes[0, 0], label="√ deviation", pad=0.01)
    axes[0, 0].set_title("How far stand-alone KV is from full recompute")
    _mark_borders(axes[0, 0], chunks, ("black", 2.0), ("white", 0.9))  # seen on dark and on bright columns
    _name_chunks(axes[0, 0], chunks, (width - 1.8) / max(num_tokens, 1))
    if shares is not None:
        shown = _show(axes[1, 0], _means(shares, per_column), **scale, cmap="Greys", vmin=0, vmax=1)
        figure.colorbar(shown, ax=axes[1, 0], label="share recomputed", pad=0.01)
        axes[1, 0].set_title("What the blend recomputed")
        _mark_borders(axes[1, 0], chunks, (VERMILION, 0.7))
    elif recomputed is not None:
        _mark_recomputed(axes[0, 0], recomputed, check_layer)
    _label_tokens(axes[-1, 0], labels, per_column)
    return figure


def deviation_insights(deviation: Float[np.ndarray, "layers tokens"]) -> Figure:
    """Draws CacheBlend's figures 7 and 8: few tokens hold most of the deviation, and neighbouring layers agree on them.

    Args:
        deviation: of candidates' stand-alone KV from full recompute: see `insights.standalone_deviation`.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    figure, axes = new_figure((11.5, 3.8), columns=2)
    _draw_concentration(figure, axes[0, 0], deviation)
    _draw_neighbour_correlation(axes[0, 1], deviation)
    return figure


def _show(axis: Any, columns: np.ndarray, *, per_column: int, num_tokens: int, **options: Any) -> Any:
    """Draws a map of layers and columns in the scale of tokens."""
    extent = (-0.5, columns.shape[1] * per_column - 0.5, columns.shape[0] - 0.5, -0.5)
    image = axis.imshow(columns, aspect="auto", interpolation="nearest", extent=extent, **options)
    axis.set(ylabel="layer", xlim=(-0.5, num_tokens - 0.5))
    whole_numbers(axis.yaxis)
    return image


def _largest(values: np.ndarray, per_column: int) -> np.ndarray:
    return np.maximum.reduceat(values, range(0, values.shape[1], per_column), axis=1)


def _means(values: np.ndarray, per_column: int) -> np.ndarray:
    starts = range(0, values.shape[1], per_column)
    counts = np.diff([*starts, values.shape[1]])
    return np.add.reduceat(values.astype(np.float32), starts, axis=1) / counts


def _label_tokens(axis: Any, words: Sequence[str] | None, per_column: int) -> None:
    shared = f" (a column: {per_column} tokens; above, the largest of them)" if per_column > 1 else ""
    axis.set_xlabel(f"token of the chunks{shared}")
    if words is None:
        whole_numbers(axis.xaxis)
    else:
        labels = [shortened(each, LONGEST_WORD) for each in words]
        set_texts(axis.xaxis, range(len(labels)), labels, rotation=90, fontsize="x-small")


def _mark_borders(axis: Any, chunks: Sequence[Part], *lines: tuple[str, float]) -> None:
    """Draws a line of each of these colours and widths between chunks, one over the other."""
    for chunk in chunks:
        if chunk.start > 0:
            for colour, line_width in lines:
                axis.axvline(chunk.start - 0.5, color=colour, linewidth=line_width)


def _name_chunks(axis: Any, chunks: Sequence[Part], inches_per_token: float) -> None:
    """Writes the chunks' names above the axis: slanted where they are wider than chunks, and as many as have room."""
    names = [shortened(chunk.name, LONGEST_NAME) for chunk in chunks]
    fits = all(
        CHARACTER_INCHES * len(name) < chunk.num_tokens * inches_per_token - 0.05
        for name, chunk in zip(names, chunks, strict=True)
    )
    places, labels = list[float](), list[str]()
    for chunk, name in zip(chunks, names, strict=True):
        if fits or not places or (chunk.middle - places[-1]) * inches_per_token >= LABEL_INCHES:
            places.append(chunk.middle)
            labels.append(name)
    slanted = {} if fits else {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
    above = axis.secondary_xaxis("top")
    above.tick_params(length=0 if fits else 3)
    set_texts(above.xaxis, places, labels, fontsize="small", **slanted)


def _mark_recomputed(axis: Any, recomputed: np.ndarray, check_layer: int | None) -> None:
    """Draws a dot for each token and layer after the check layer that was recomputed, and says so."""
    first = 0 if check_layer is None else check_layer + 1
    layers, tokens = np.nonzero(recomputed[first:])
    dots = {"color": "white", "markeredgecolor": "black", "markersize": 4.5, "linestyle": "none"}
    axis.plot(tokens, layers + first, "o", label="recomputed by the blend", **dots)
    if check_layer is not None:
        label = "check layer: up to here, all are computed"
        axis.axhline(check_layer + 0.5, color="white", linewidth=1.5, linestyle="--", label=label)
    axis.figure.legend(loc="outside lower right", ncols=2, fontsize="small", facecolor="0.6", frameon=True)


def _draw_concentration(figure: Figure, axis: Any, deviation: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    tokens = np.arange(1, deviation.shape[1] + 1) / deviation.shape[1]
    scale = ScalarMappable(Normalize(1, max(len(deviation) - 1, 2)), colormaps["viridis"])
    shades = scale.cmap(np.linspace(0, 1, len(deviation) - 1))
    for layer in range(1, len(deviation)):
        held = np.cumsum(np.sort(deviation[layer])[::-1])
        if held[-1] > 0:
            axis.plot(tokens, held / held[-1], color=shades[layer - 1])
    axis.axvline(TOP_SHARE, color="black", linewidth=1, linestyle=":", label=f"top {TOP_SHARE:.0%}")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, label="an even spread")
    highest = concentration(deviation)[1:]
    known = highest[np.isfinite(highest)]
    axis.set(
        xlabel="share of tokens, those that deviate most first",
        ylabel="share of the layer's KV deviation",
        title=f"The top {TOP_SHARE:.0%} of tokens hold {known.mean():.0%} of the deviation"
        if known.size
        else "No token deviates",
    )
    axis.legend(fontsize="small", loc="lower right")
    whole_numbers(figure.colorbar(scale, ax=axis, label="layer").ax.yaxis)


def _draw_neighbour_correlation(axis: Any, deviation: np.ndarray) -> None:
    correlation = neighbour_correlation(deviation[1:])
    known = correlation[np.isfinite(correlation)]
    mean = f": {known.mean():.2f} on average" if known.size else ""
    axis.bar(range(1, len(deviation) - 1), correlation)
    axis.set(
        xlabel="layer",
        ylabel="rank correlation with the next layer",
        title=f"Agreement of neighbouring layers{mean}",
        ylim=(known.min(initial=0.0), 1),
    )
    whole_numbers(axis.xaxis)
    axis.grid(axis="y", alpha=0.3)
