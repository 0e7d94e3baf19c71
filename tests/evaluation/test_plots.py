"""The pictures, by what is on their figures: labels, colours of their own, whole layers, chunk borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cacheblend_jax.evaluation import plots
from cacheblend_jax.evaluation.settings import Setting

pytest.importorskip("matplotlib")
LAYERS, CHUNKS = 8, (10, 20, 15)
SETTINGS = [Setting("full"), Setting("reuse")]
SETTINGS += [Setting("blend", name, ratio) for name in ("hkvd", "query", "cross", "epic") for ratio in (0.05, 0.1, 0.3)]
SETTINGS += [Setting("blend", "hkvd", 0.3, num_stages=1)]


def summary() -> list[dict]:
    rng = np.random.default_rng(0)
    lines = []
    for setting in SETTINGS:
        line = dict.fromkeys(plots.CURVES, rng.random()) | {"exact_match_interval": (0.1, 0.9)}
        line |= {"recovered": rng.random(), "recovered_interval": (0.1, 0.9), "flops": 1e9 * rng.random()}
        line |= {f"{name}_deviation_by_layer": rng.random(LAYERS) for name in ("kv", "attention")}
        lines.append(line | {"setting": setting.label, "kind": "all"})
    return lines


@pytest.fixture(scope="module")
def figures() -> dict:
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}) or path)
        deviation = np.random.default_rng(1).random((LAYERS, sum(CHUNKS))).astype(np.float32)
        plots.draw(Path(), SETTINGS, summary(), deviation, CHUNKS)
    for figure in drawn.values():
        figure.canvas.draw()  # ticks are placed
    return drawn


def test_every_axis_says_what_it_shows(figures):
    assert sorted(figures) == ["deviation.png", "insights.png", "layers.png", "quality.png", "recovered.png"]
    for name, figure in figures.items():
        for axis in figure.axes:
            assert axis.get_ylabel() or (name == "quality.png" and axis.get_title()), name
            if axis.get_label() != "<colorbar>":
                assert axis.get_xlabel(), name
                assert axis.get_title(), name


@pytest.mark.parametrize("picture", ["quality.png", "recovered.png", "layers.png"])
def test_no_two_lines_have_one_colour(figures, picture):
    from matplotlib.colors import to_hex

    for axis in figures[picture].axes:
        lines = [line for line in axis.get_lines() if line.get_marker() == "o"]
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines) >= 5


def test_layers_are_whole_numbers(figures):
    axes = [*(axis.xaxis for axis in figures["layers.png"].axes), figures["deviation.png"].axes[0].yaxis]
    axes += [figures["insights.png"].axes[1].xaxis, figures["insights.png"].axes[2].yaxis]
    for axis in axes:
        assert len(axis.get_majorticklocs()) > 1
        assert all(place == round(place) for place in axis.get_majorticklocs())


def test_bands_are_explained(figures):
    for picture in ("quality.png", "recovered.png"):
        assert "95 % intervals" in figures[picture].axes[0].get_title()


def test_borders_and_numbers_of_chunks_are_on_the_map(figures):
    axis = figures["deviation.png"].axes[0]
    assert [line.get_xdata()[0] for line in axis.get_lines()] == [9.5, 29.5]
    assert [text.get_text() for text in axis.texts] == ["0", "1", "2"]


def test_a_model_of_two_layers_has_its_pictures(monkeypatch):
    monkeypatch.setattr(plots, "_save", lambda figure, path: figure.canvas.draw() or path)
    for draw in (plots._insights, lambda path, deviation: plots._heat_map(path, deviation, CHUNKS)):
        assert draw(Path("two.png"), np.ones((2, sum(CHUNKS)))) == Path("two.png")


def test_a_chunk_that_is_exact_where_it_stands_is_not_on_the_map(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plots._heat_map(Path("deviation.png"), np.ones((LAYERS, sum(CHUNKS[1:]))), CHUNKS)
    (axis, _) = drawn[0].axes
    assert [line.get_xdata()[0] for line in axis.get_lines()] == [19.5]
    assert [text.get_text() for text in axis.texts] == ["1", "2"]
