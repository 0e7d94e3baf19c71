"""The pictures of one prompt: right at ten tokens and at 6,000, with no label over another."""

from __future__ import annotations

import numpy as np
import pytest
from inspections import CHECK_LAYER, made_inspection

from cacheblend_jax.evaluation.deviation_plots import MOST_WORDS, deviation_map
from cacheblend_jax.evaluation.figures import save_figures
from cacheblend_jax.evaluation.inspection_plots import attention_between_chunks, inspection_figures
from cacheblend_jax.evaluation.parts import Part

pytest.importorskip("matplotlib")
SIZES = {
    "ten tokens": ((4, 6), ("a.md 0", "a.md 1")),
    "two lines": ((60, 70), None),
    "6,000 tokens": ((500,) * 12, [f"guide/{'long ' * 9}name.md {number}" for number in range(12)]),
    "many chunks": ((8,) * 150, None),
}


def labels_overlap(axis) -> bool:
    """Whether any two labels of an axis's ticks share a place; slanted ones stand on lines of their own."""
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    if labels and labels[0].get_rotation() not in (0, 90):
        starts = sorted(label.get_window_extent().x0 for label in labels)
        height = labels[0].get_fontsize() * axis.figure.dpi / 72
        return min(np.diff(starts), default=height) < height
    boxes = [label.get_window_extent() for label in labels]
    return any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])


@pytest.fixture(params=SIZES, scope="module")
def inspection(request):
    return made_inspection(*SIZES[request.param])


@pytest.fixture(scope="module")
def figures(inspection):
    figures = inspection_figures(inspection)
    for figure in figures.values():
        figure.canvas.draw()
    return figures


def test_no_label_lies_over_another(figures):
    assert list(figures) == ["deviation", "attention", "insights"]
    for name, figure in figures.items():
        for axis in [*figure.axes, *(child for each in figure.axes for child in each.child_axes)]:
            assert not labels_overlap(axis.xaxis), name
            assert not labels_overlap(axis.yaxis), name


def test_nothing_leaves_the_picture(figures):
    for figure in figures.values():
        box = figure.get_tightbbox()
        assert box.x0 > -0.05
        assert box.y0 > -0.05
        assert box.x1 < figure.get_figwidth() + 0.05
        assert box.y1 < figure.get_figheight() + 0.05


def test_legends_lie_within_their_axes_above_the_lines(figures):
    for axis in figures["attention"].axes[-2:]:
        box, within = axis.get_legend().get_window_extent(), axis.get_window_extent()
        assert within.x0 < box.x0 < box.x1 < within.x1
        highest = max(line.get_ydata().max() for line in axis.get_lines())
        assert axis.transData.transform((0, highest))[1] < box.y0


def test_every_token_of_a_short_prompt_has_its_word_and_a_dot_where_it_was_recomputed():
    inspection = made_inspection()
    figure = inspection_figures(inspection)["deviation"]
    axis = figure.axes[0]
    words = [label.get_text() for label in axis.get_xticklabels()]
    assert words == [inspection.texts[number].strip() for number in range(3, 13)]
    (dots,) = [line for line in axis.get_lines() if line.get_marker() == "o"]
    wanted = [
        (token, layer)
        for layer in range(CHECK_LAYER + 1, 6)
        for token in range(10)
        if inspection.recomputed[layer, 3 + token]
    ]
    assert list(zip(*dots.get_data(), strict=True)) == wanted
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "recomputed by the blend",
        "check layer: up to here, all are computed",
    }


def test_tokens_of_a_long_prompt_share_columns_and_none_is_lost():
    deviation = np.zeros((3, 6001), np.float32)
    deviation[2, 6000], deviation[1, 7] = 4.0, 9.0
    recomputed = np.zeros((3, 6001), bool)
    recomputed[2, :3] = True
    figure = deviation_map(deviation, [Part("a", 0, 3000), Part("b", 3000, 6001)], recomputed=recomputed)
    above, below = (axis.get_images()[0].get_array() for axis in figure.axes[:2])
    assert above.shape == below.shape == (3, 1001)
    assert (above[2, 1000], above[1, 1], np.count_nonzero(above)) == (2, 3, 2)
    assert below[2, 0] == pytest.approx(0.5)  # three of six
    assert not figure.axes[1].get_xticklabels()[0].get_text().isalpha()
    assert "6 tokens" in figure.axes[1].get_xlabel()
    assert figure.axes[0].get_xlim() == (-0.5, 6000.5)


def test_words_are_text_whatever_they_say(tmp_path):
    """No formula, no break of the line, and for scripts that the font lacks no warning."""
    words = ("$x^2$", "\n\n", " ", "", "\t", "\x00", "日本", "w" * 40, "%", "\ud800", "{")
    inspection = made_inspection((6, 6), ("$a$ 0", "b_1\udcff"), words=words)
    figures = inspection_figures(inspection)
    save_figures(tmp_path, figures)
    labels = [label.get_text() for label in figures["deviation"].axes[0].get_xticklabels()]
    assert {"$x^2$", "¶¶", "␣", "·", "⇥", "␀"} <= set(labels)
    assert max(map(len, labels)) <= 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "deviation.png", "insights.png"]


def test_a_single_chunk_has_its_pictures():
    figure = attention_between_chunks(made_inspection((MOST_WORDS + 1,)))
    figure.canvas.draw()
    assert figure.get_suptitle() == ""


def test_the_attention_between_chunks_is_on_the_matrices():
    inspection = made_inspection()
    figure = attention_between_chunks(inspection)
    share = inspection.cross_attention_share("blend")
    assert share == pytest.approx(0.5)
    assert "reuse has 0% and blend has 50%" in figure.get_suptitle()
    full = figure.axes[0].get_images()[0].get_array()
    assert full.shape == (3, 2)  # two chunks and the question, to two chunks
    assert full[1, 0] == pytest.approx(inspection.attention["full"][:, 2, 1].mean())
    assert full.mask.tolist() == [[True, True], [False, True], [False, False]]
