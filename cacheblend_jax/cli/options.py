"""What the commands share: options, the files that results go to, progress on a terminal, and loading a model."""

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
    """Adds what every command takes that runs a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights to it (default: as stored)"
    )
    add_json_option(parser)
    parser.add_argument("--no-compile-cache", action="store_true", help="do not keep compiled programs on disk")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`, which `main` serves."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, the bundled one by default."""
    parser.add_argument(
        "--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (default: demo)"
    )


def at_least_one(text: str) -> int:
    """Parses a whole number of at least 1."""
    return _whole_number(text, 1)


def at_least_zero(text: str) -> int:
    """Parses a whole number of at least 0."""
    return _whole_number(text, 0)


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"name\": false}}', got {text!r}")
    return value


def _whole_number(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before the work whose results are to go there.

    Raises:
        CacheBlendError: names the option, the file and the reason.
    """
    if path is None:
        return
    reason = None
    if path.is_dir():
        reason = "is a directory"
    elif not path.parent.is_dir():
        reason = f"{path.parent} is not a directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    if reason is not None:
        raise CacheBlendError(f"cannot write {option} {path}: {reason}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes a command's results.

    Raises:
        CacheBlendError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CacheBlendError(f"cannot write --json {path}: {error.strerror}; choose another path") from error


def load_with_bar(name: str, dtype: str | None) -> Model:
    """Loads a model and shows how far it has come."""
    with progress_bar("load", unit="B", unit_scale=True) as advance:
        return load_model(name, dtype=dtype, progress=advance)


def progress(items: Iterable, what: str) -> Iterable:
    """Shows a bar on a terminal while the items are taken: the `Progress` of `cacheblend_jax.evaluation`."""
    return tqdm(items, desc=what, disable=not sys.stderr.isatty(), leave=False)


@contextmanager
def progress_bar(what: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on a terminal; yields a function to be called with the amount done and the total."""
    with tqdm(total=None, desc=what, disable=not sys.stderr.isatty(), leave=False, **options) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def print_status(line: str) -> None:
    """Prints a line that is not a result: to stderr."""
    print(line, file=sys.stderr, flush=True)
