"""What all pictures share: a figure to draw on, its colours and ticks, and the directory that it is saved in.

A figure here belongs to no window: any thread can draw it, a notebook shows it, `figure.savefig` saves it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.evaluation.parts import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is an extra

# Colours that people tell apart who see no difference between red and green (Okabe and Ito, 2008); one is too bright.
BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
GREY, BLACK = "#4d4d4d", "#000000"
SELECTOR_COLOURS = {"hkvd": BLUE, "cross": ORANGE, "query": GREEN, "epic": PURPLE, "random": GREY, "oracle": VERMILION}
MODE_COLOURS = {"full": BLACK, "reuse": VERMILION, "blend": BLUE}
FREE_COLOURS = (SKY, BLUE, ORANGE, GREEN, PURPLE, VERMILION, GREY, BLACK)
MARKERS = "osD^vP*X<>"


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """Returns a figure of a size in inches, and its axes `[rows, columns]`; `options` are those of `Figure.subplots`.

    Raises:
        CacheBlendError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def check_matplotlib() -> None:
    """Raises `CacheBlendError` where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise CacheBlendError(f"pictures need matplotlib: pip install 'cacheblend-jax[plots]' ({error})") from error


def make_picture_directory(directory: Path) -> None:
    """Makes the directory that pictures go to, where it is missing: before the work whose results they show.

    Raises:
        CacheBlendError: matplotlib is missing, or the directory cannot be made or written.
    """
    check_matplotlib()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheBlendError(f"cannot make the pictures' directory {directory}: {reason_and_remedy(error)}") from error
    if not os.access(directory, os.W_OK):
        raise CacheBlendError(f"cannot write pictures into {directory}: no permission; choose another directory")


def save_figures(directory: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Saves figures as PNG files of their names into a directory, which is made if missing; returns the files.

    Raises:
        CacheBlendError: the directory, or a file, cannot be written.
    """
    make_picture_directory(directory)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        try:
            with warnings.catch_warnings():
                # matplotlib draws a box for a character of a script that its font lacks: the picture says so itself.
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                figure.savefig(paths[-1], dpi=130)
        except OSError as error:
            raise CacheBlendError(f"cannot write {paths[-1]}: {reason_and_remedy(error)}") from error
    return paths


def colours_of(names: Sequence[str]) -> dict[str, Any]:
    """Returns a colour of its own for each name: a selector's usual one, or one that no other of them has."""
    usual = {name: SELECTOR_COLOURS[name] for name in names if name in SELECTOR_COLOURS}
    others = [name for name in names if name not in usual]
    free = [colour for colour in FREE_COLOURS if colour not in usual.values()]
    if len(others) <= len(free):
        return usual | dict(zip(others, free, strict=False))
    from matplotlib import colormaps

    return dict(zip(names, colormaps["turbo"](np.linspace(0, 1, len(names))), strict=True))


def styles_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns options of `plot` for each name: a colour, and a marker for those who see none."""
    colours = colours_of(names)
    markers = {name: MARKERS[number % len(MARKERS)] for number, name in enumerate(names)}
    return {name: {"color": colours[name], "marker": markers[name], "fillstyle": "none"} for name in names}


def whole_numbers(axis: Any) -> None:
    """Puts an axis's ticks at whole numbers only, such as layers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def set_texts(axis: Any, places: Sequence[float], texts: Sequence[str], **options: Any) -> None:
    """Labels places of an axis with texts as they are: a `$` in them begins no formula."""
    axis.set_ticks(places, [printable(text) for text in texts], **options)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
