"""How far long work has come: a bar on a terminal, and elsewhere, as in a log file, a line every so often."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0
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
    if not sys.stderr.isatty():
        with progress_lines(what, **options) as advance:
            yield advance
        return
    with tqdm(total=None, desc=what, leave=False, **options) as bar:

        def move(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


@contextmanager
def progress_lines(what: str, *, unit: str = "", unit_scale: bool = False) -> Iterator[Advance]:
    """As `progress_bar`, but prints a line every `LINE_SECONDS`, whether or not anything moves."""
    began, ended = time.monotonic(), threading.Event()
    at: tuple[int, int | None] = (0, None)

    def advance(done: int, total: int | None) -> None:
        nonlocal at
        at = (done, total)

    def amount(number: int) -> str:
        return f"{tqdm.format_sizeof(number) if unit_scale else number}{unit}"

    def print_lines() -> None:
        while not ended.wait(LINE_SECONDS):
            done, total = at
            of_total = "" if total is None else f" of {amount(total)}"
            line = f"{what}: {amount(done)}{of_total}, {time.monotonic() - began:.0f} s"
            print(line, file=sys.stderr, flush=True)

    thread = threading.Thread(target=print_lines, name="cacheblend-progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
