"""How far long work has come: on one line of a terminal, and elsewhere, as in a log file, a line every so often."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0
REDRAWN_SECONDS = 0.2  # on a terminal
ERASE = "\r\x1b[K"
Advance = Callable[[int, int | None], None]  # (done, total)


def progress(items: Iterable, what: str) -> Iterator:
    """Shows how far the items have been taken: the `Progress` of `cacheblend_jax.evaluation`."""
    total = len(items) if isinstance(items, Sized) else None
    with progress_bar(what) as advance:
        advance(0, total)
        for done, item in enumerate(items, 1):
            yield item
            advance(done, total)


@contextmanager
def progress_bar(what: str, **options: Any) -> Iterator[Advance]:
    """Shows how far some work has come; yields a function to be called with the amount done and the total.

    Args:
        options: of tqdm: `unit`, and `unit_scale` where amounts are large.
    """
    if not is_terminal():
        with progress_lines(what, **options) as advance:
            yield advance
        return
    with tqdm(total=None, desc=what, leave=False, disable=is_quiet(), **options) as bar:

        def move(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


@contextmanager
def progress_lines(what: str, *, unit: str = "", unit_scale: bool = False) -> Iterator[Advance]:
    """As `progress_bar`, but prints a line every `LINE_SECONDS`, whether or not anything moves."""
    at: tuple[int, int | None] = (0, None)

    def advance(done: int, total: int | None) -> None:
        nonlocal at
        at = (done, total)

    with _shown(lambda: f"{what}: {_amount(*at, unit, unit_scale)}", on_terminal=False):
        yield advance


class Parts:
    """Pieces of work, several of them at the same time; see `progress_of_parts`."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def part(self, what: str, *, unit: str = "", unit_scale: bool = False) -> Advance:
        """Shows a piece of work from now on, until the function returned is called with all of it done."""
        self._show(what, what)

        def advance(done: int, total: int | None) -> None:
            self._show(what, "" if done == total else f"{what} {_amount(done, total, unit, unit_scale)}")

        return advance

    def items(self, items: Iterable, what: str) -> Iterator:
        """Shows how far the items have been taken: the `Progress` of `cacheblend_jax.evaluation`."""
        total, advance = len(items) if isinstance(items, Sized) else None, self.part(what)
        done = 0
        for done, item in enumerate(items, 1):
            yield item
            advance(done, total)
        advance(done, done)

    def text(self) -> str:
        """Returns how far all parts that are not done have come, in the order in which they began."""
        with self._lock:
            return ", ".join(self._texts.values()) or "working"

    def _show(self, what: str, text: str) -> None:
        with self._lock:
            if text:
                self._texts[what] = text
            else:
                self._texts.pop(what, None)


@contextmanager
def progress_of_parts() -> Iterator[Parts]:
    """Shows on one line how far pieces of work have come: on a terminal from the beginning, rewritten as they move."""
    parts = Parts()
    with _shown(parts.text, on_terminal=is_terminal()):
        yield parts


def is_terminal() -> bool:
    """Returns whether stderr is a terminal on which a line can be written anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_quiet() -> bool:
    """Returns whether progress is not to be shown, nor any line that says what is being done."""
    return _quiet.is_set()


@contextmanager
def without_progress(wanted: bool) -> Iterator[None]:
    """Shows no progress in its body where that is wanted."""
    if wanted:
        _quiet.set()
    try:
        yield
    finally:
        _quiet.clear()


@contextmanager
def line_erased() -> Iterator[None]:
    """Takes the line that is rewritten off the terminal, so that its body can print another."""
    with _drawing:
        if _is_drawn.is_set():
            sys.stderr.write(ERASE)
            _is_drawn.clear()
        yield


_drawing, _is_drawn, _quiet = threading.RLock(), threading.Event(), threading.Event()


@contextmanager
def _shown(text: Callable[[], str], *, on_terminal: bool) -> Iterator[None]:
    """Has a thread show a text and the time that has passed: at once on a terminal, every `LINE_SECONDS` elsewhere."""
    if is_quiet():
        yield
        return
    began, ended = time.monotonic(), threading.Event()

    def show() -> None:
        while not ended.wait(REDRAWN_SECONDS if on_terminal else LINE_SECONDS):
            redraw() if on_terminal else print(line(), file=sys.stderr, flush=True)

    def line() -> str:
        return f"{text()}, {time.monotonic() - began:.0f} s"

    def redraw() -> None:
        with _drawing:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            sys.stderr.write(ERASE + line()[:width])
            sys.stderr.flush()
            _is_drawn.set()

    if on_terminal:
        redraw()
    thread = threading.Thread(target=show, name="cacheblend-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with line_erased():
            sys.stderr.flush()


def _amount(done: int, total: int | None, unit: str, unit_scale: bool) -> str:
    """Returns `"3 of 7"`, or `"270MB of 540MB"`; of an unknown total, what is done."""
    amounts = [done] if total is None else [done, total]
    return " of ".join(f"{tqdm.format_sizeof(each) if unit_scale else each}{unit}" for each in amounts)
