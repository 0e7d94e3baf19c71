"""The pictures of an evaluation, by what is on their figures: labels, colours of their own, whole layers, borders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.evaluation import figures as shared
from cacheblend_jax.evaluation import plots
from cacheblend_jax.evaluation.deviation_plots import deviation_insights, deviation_map
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


def drawn_figures(deviation: np.ndarray, chunk_lengths=CHUNKS) -> dict:
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figures", lambda directory, figures: drawn.update(figures) or [])
        plots.draw(Path(), SETTINGS, summary(), deviation, chunk_lengths)
    for figure in drawn.values():
        figure.canvas.draw()  # ticks are placed
    return drawn


@pytest.fixture(scope="module")
def figures() -> dict:
    return drawn_figures(np.random.default_rng(1).random((LAYERS, sum(CHUNKS))).astype(np.float32))


def names_of_chunks(figure) -> list[str]:
    (above,) = figure.axes[0].child_axes
    return [label.get_text() for label in above.get_xticklabels()]


def test_every_axis_says_what_it_shows(figures):
    assert sorted(figures) == ["deviation", "insights", "layers", "quality", "recovered"]
    for name, figure in figures.items():
        for axis in figure.axes:
            assert axis.get_ylabel() or (name == "quality" and axis.get_title()), name
            if axis.get_label() != "<colorbar>":
                assert axis.get_xlabel(), name
                assert axis.get_title(), name


@pytest.mark.parametrize("picture", ["quality", "recovered", "layers"])
def test_no_two_lines_look_alike(figures, picture):
    from matplotlib.colors import to_hex

    for axis in figures[picture].axes:
        lines = [line for line in axis.get_lines() if line.get_marker() != "None"]
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines) >= 5
        assert len({line.get_marker() for line in lines}) >= min(len(lines), len(shared.MARKERS))


def test_selectors_have_colours_that_differ_in_brightness_or_in_blue():
    """People who see no difference between red and green see these two."""
    from matplotlib.colors import to_rgb

    seen = [(0.3 * red + 0.6 * green, blue) for red, green, blue in map(to_rgb, shared.SELECTOR_COLOURS.values())]
    for number, one in enumerate(seen):
        for other in seen[:number]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


def test_layers_are_whole_numbers(figures):
    axes = [*(axis.xaxis for axis in figures["layers"].axes), figures["deviation"].axes[0].yaxis]
    axes += [figures["insights"].axes[1].xaxis, figures["insights"].axes[2].yaxis]
    for axis in axes:
        assert len(axis.get_majorticklocs()) > 1
        assert all(place == round(place) for place in axis.get_majorticklocs())


def test_bands_are_explained(figures):
    for picture in ("quality", "recovered"):
        assert "95 % intervals" in figures[picture].axes[0].get_title()


def test_borders_and_numbers_of_chunks_are_on_the_map(figures):
    axis = figures["deviation"].axes[0]
    assert sorted({line.get_xdata()[0] for line in axis.get_lines()}) == [9.5, 29.5]
    assert names_of_chunks(figures["deviation"]) == ["0", "1", "2"]


def test_a_model_of_two_layers_has_its_pictures():
    deviation = np.ones((2, sum(CHUNKS)), np.float32)
    for figure in (deviation_insights(deviation), deviation_map(deviation, plots._last_chunks(CHUNKS, sum(CHUNKS)))):
        figure.canvas.draw()


def test_a_prompt_none_of_whose_tokens_deviates_has_its_pictures():
    figures = drawn_figures(np.zeros((LAYERS, sum(CHUNKS)), np.float32))
    assert figures["insights"].axes[0].get_title() == "No token deviates"


def test_a_chunk_that_is_exact_where_it_stands_is_not_on_the_map():
    figure = drawn_figures(np.ones((LAYERS, sum(CHUNKS[1:])), np.float32))["deviation"]
    assert {line.get_xdata()[0] for line in figure.axes[0].get_lines()} == {19.5}
    assert names_of_chunks(figure) == ["1", "2"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: shared.make_picture_directory(tmp_path / "plots"), lambda: shared.new_figure((1.0, 1.0))):
        with pytest.raises(cb.CacheBlendError, match=r"pip install 'cacheblend-jax\[plots\]'"):
            draw()
    assert not (tmp_path / "plots").exists()


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cb.CacheBlendError, match=r"cannot make the pictures' directory .*/file"):
        shared.make_picture_directory(tmp_path / "file")
    (tmp_path / "plots" / "map.png").mkdir(parents=True)
    figure, _ = shared.new_figure((1.0, 1.0))
    with pytest.raises(cb.CacheBlendError, match=r"cannot write .*map\.png"):
        shared.save_figures(tmp_path / "plots", {"map": figure})
