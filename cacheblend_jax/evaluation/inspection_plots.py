"""Pictures of an inspection: one prompt's deviation, and the attention between its chunks (CacheBlend, figure 4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cacheblend_jax.evaluation.deviation_plots import deviation_insights, deviation_map
from cacheblend_jax.evaluation.figures import MODE_COLOURS, Figure, new_figure, set_texts, whole_numbers
from cacheblend_jax.evaluation.inspection import ATTENTION_OF, Inspection
from cacheblend_jax.evaluation.parts import shortened, word

MOST_NUMBERS = 8  # chunks whose cells say their value
MOST_NAMES = 25  # chunks that are named; of more, some are numbered
LONGEST_NAME = 16
MODE_LINES = {"full": "--", "reuse": ":", "blend": "-"}


def inspection_figures(inspection: Inspection) -> dict[str, Figure]:
    """Draws an inspection; returns its figures by name.

    Those are `deviation` (of each token at each layer), `attention` (between the chunks) and, where the KV of some
    tokens may deviate, `insights` (few tokens hold most of it; neighbouring layers agree on them).

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    first, last = inspection.chunks[0].start, inspection.chunks[-1].stop
    tokens = slice(first, last)
    figures = {
        "deviation": deviation_map(
            inspection.deviation[:, tokens],
            [chunk.moved(-first) for chunk in inspection.chunks],
            words=[word(text) for text in inspection.texts[tokens]],
            recomputed=inspection.recomputed[:, tokens],
            check_layer=inspection.check_layer,
        ),
        "attention": attention_between_chunks(inspection),
    }
    if inspection.candidate.any():
        figures["insights"] = deviation_insights(inspection.deviation[:, inspection.candidate])
    return figures


def attention_between_chunks(inspection: Inspection) -> Figure:
    """Draws what chunks and question paid to each chunk in full recompute, reuse and the blend; and by layer.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    side = min(max(2.6, 0.5 * len(inspection.chunks)), 4.2)
    figure, axes = new_figure((3 * side + 2.2, side + 4.6), rows=2, columns=3, height_ratios=(side, 2.7))
    shares = {mode: inspection.cross_attention_share(mode) for mode in ("reuse", "blend")}
    if np.isfinite(shares["reuse"]):
        said = " and ".join(f"{mode} has {share:.0%}" for mode, share in shares.items())
        figure.suptitle(f"Of the attention between chunks in full recompute, {said}")
    _draw_matrices(figure, axes[0], inspection)
    for axis in axes[1]:
        axis.remove()
    below = axes[1, 0].get_gridspec()
    _draw_cross_attention(figure.add_subplot(below[1, :2]), inspection)
    _draw_question(figure.add_subplot(below[1, 2]), inspection)
    return figure


def _draw_matrices(figure: Figure, axes: np.ndarray, inspection: Inspection) -> None:
    from matplotlib.colors import PowerNorm

    size = len(inspection.chunks)
    paid = {mode: inspection.attention[mode].mean(axis=0)[1:, 1:-1] for mode in ATTENTION_OF}
    for matrix in paid.values():
        matrix[np.triu_indices(size)] = np.nan  # a chunk's own attention, and what comes later, is in no question
    norm = PowerNorm(0.5, 0, max(np.nanmax(matrix) for matrix in paid.values()))
    for axis, mode in zip(axes, ATTENTION_OF, strict=True):
        image = axis.imshow(paid[mode], cmap="cividis", norm=norm)
        axis.set_facecolor("0.85")
        axis.set_title(mode)
        axis.set_xlabel("paid to")
        _name_chunks(axis.xaxis, inspection, with_question=False, rotation=90)
        _name_chunks(axis.yaxis, inspection, with_question=True)
        if size <= MOST_NUMBERS:
            _write_numbers(axis, paid[mode], norm)
    axes[0].set_ylabel("by a token of")
    figure.colorbar(image, ax=list(axes), label="share of its attention", pad=0.01)


def _name_chunks(axis: Any, inspection: Inspection, *, with_question: bool, **options: Any) -> None:
    names = [shortened(chunk.name, LONGEST_NAME) for chunk in inspection.chunks]
    places = list(range(len(names)))
    if len(names) > MOST_NAMES:
        places = places[:: -(-len(names) // MOST_NAMES)]
    labels = [names[place] for place in places]
    if with_question:
        places, labels = [*places, len(names)], [*labels, "question"]
    set_texts(axis, places, labels, fontsize="x-small", **options)


def _write_numbers(axis: Any, values: np.ndarray, norm: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if norm(value) > 0.5 else "white"
            text = f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize="x-small")


def _draw_cross_attention(axis: Any, inspection: Inspection) -> None:
    _draw_by_layer(axis, {mode: (mode, values) for mode, values in inspection.cross_attention.items()})
    axis.set(ylabel="share of its attention", title="What a chunk's token pays to other chunks")


def _draw_question(axis: Any, inspection: Inspection) -> None:
    deviation = inspection.attention_deviation
    _draw_by_layer(
        axis, {mode: (f"{mode}, mean {each.mean():.2f}", each) for mode, each in deviation.items()}, columns=1
    )
    axis.set(ylabel="distance, relative", title="The question's attention\nfrom full recompute")


def _draw_by_layer(axis: Any, lines: dict[str, tuple[str, np.ndarray]], columns: int = 3) -> None:
    """Draws a line for each mode, with its name, below a legend of so many columns."""
    for mode, (name, by_layer) in lines.items():
        style = {"color": MODE_COLOURS[mode], "linestyle": MODE_LINES[mode]}
        axis.plot(by_layer, "o", markersize=3, label=name, **style)
    legend_rows = -(-len(lines) // columns)
    axis.set_ylim(0, (1.1 + 0.15 * legend_rows) * max(axis.get_ylim()[1], 1e-6))
    axis.legend(fontsize="small", loc="upper right", ncols=columns)
    axis.set_xlabel("layer")
    whole_numbers(axis.xaxis)
    axis.grid(alpha=0.3)
