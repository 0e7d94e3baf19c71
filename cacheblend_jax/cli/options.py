"""What the commands share: options, progress, loading, and the files that results go to."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model, load_model


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands over a model take."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights (as stored)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--no-compile-cache", action="store_true", help="do not keep compiled programs on disk")


def count(text: str) -> int:
    """An argument that counts something: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before the work whose results are to go there."""
    if path is None:
        return
    why = None
    if path.is_dir():
        why = "is a directory"
    elif not path.parent.is_dir():
        why = f"{path.parent} is not a directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "no permission"
    if why is not None:
        raise CacheBlendError(f"cannot write {option} {path}: {why}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes a command's results.

    Raises:
        CacheBlendError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CacheBlendError(f"cannot write --json {path}: {error.strerror}; choose another path") from error


def load(name: str, dtype: str | None) -> Model:
    """Loads a model, with a bar."""
    with progress_bar("load", unit="B", unit_scale=True) as advance:
        return load_model(name, dtype=dtype, progress=advance)


def progress(items: Iterable, what: str) -> Iterable:
    """The items, with a bar on a terminal."""
    return tqdm(items, desc=what, disable=not sys.stderr.isatty(), leave=False)


@contextmanager
def progress_bar(what: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; yields what is to be called with the amount done and the total."""
    with tqdm(total=None, desc=what, disable=not sys.stderr.isatty(), leave=False, **options) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def say(line: str) -> None:
    """Prints a line that is no result."""
    print(line, file=sys.stderr, flush=True)
