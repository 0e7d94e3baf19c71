"""What the commands share: options, the files that results go to, and loading a model."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cacheblend_jax.choices import KERNELS
from cacheblend_jax.cli.progress import is_quiet, line_erased, progress_bar
from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.model.smollm2 import SMOLLM2

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.model import Model
    from cacheblend_jax.store import ChunkStore

BUNDLED = "demo"
STANDARD_STREAM = Path("-")  # in place of a file
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(iB?|B)?|B)?", re.IGNORECASE)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are: the usage is a page long."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and ends the process with exit code 2."""
        self.exit(2, f"cacheblend-jax: error: {' '.join(message.split())}; see {self.prog} --help\n")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every command takes that runs a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights to it (default: as stored)"
    )
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="how attention and blending are computed (default: auto, what was found right and fastest on the device)",
    )
    add_output_options(parser)
    parser.add_argument("--no-compile-cache", action="store_true", help="do not keep compiled programs on disk")
    parser.add_argument("--no-weight-cache", action="store_true", help="do not keep dequantised weights on disk")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says where results go, and what is said beside them; `main` serves these options."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results as JSON; - writes them to stdout, and nothing else"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="print results, warnings and errors alone")
    amount.add_argument("-v", "--verbose", action="store_true", help="also print what is done in detail")


def add_store_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds `--store` and the sizes of its tiers."""
    from cacheblend_jax.store.chunk_store import DEFAULT_HOST_BYTES

    parser.add_argument(
        "--store", metavar="DIR", required=required, help="keep the chunks' KV in a directory, for the next time"
    )
    parser.add_argument(
        "--host-bytes",
        type=size_of_at_least_one,
        default=DEFAULT_HOST_BYTES,
        metavar="SIZE",
        help="host memory for the chunks' KV: bytes, or 4G, 512MiB, 500MB (default: 4G)",
    )
    parser.add_argument(
        "--disk-bytes",
        type=size_of_at_least_one,
        metavar="SIZE",
        help="most that --store may hold; the least recently used goes first (default: 64G, or what is there already)",
    )
    add_kv_dtype_option(parser)


def add_kv_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--kv-dtype`: how KV that is computed from now on is stored."""
    parser.add_argument(
        "--kv-dtype",
        type=kv_dtype,
        metavar="DTYPE",
        help="quantise KV when it is stored: int8, float8_e4m3fn or none (default: none)",
    )


def kv_dtype(text: str) -> str | None:
    """Parses a dtype of quantised KV; `None` for `"none"`."""
    from cacheblend_jax.store.quantise import NOT_QUANTISED, check_kv_dtype

    value = None if text == NOT_QUANTISED else text
    try:
        check_kv_dtype(value)
    except CacheBlendError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def open_store(parsed: argparse.Namespace) -> ChunkStore:
    """Opens the store that the options of `add_store_options` name.

    Raises:
        CacheBlendError: there is a size for a directory, but no directory; or as `ChunkStore`.
    """
    from cacheblend_jax.store import ChunkStore

    if parsed.store is None and parsed.disk_bytes is not None:
        raise CacheBlendError("--disk-bytes bounds the directory of --store, which is missing; add --store DIR")
    sizes = {"host_bytes": parsed.host_bytes, "disk_bytes": parsed.disk_bytes}
    return ChunkStore(parsed.store, **sizes, kv_dtype=parsed.kv_dtype)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`; `load_with_bar` takes the bundled model where it is not given."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help=f"checkpoint directory, hub id, .gguf file or {SMOLLM2} (default: {BUNDLED}, the bundled model)",
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


def size_of_at_least_one(text: str) -> int:
    """Parses a size of at least 1 byte; see `_size`."""
    return _size(text, 1)


def size_of_at_least_zero(text: str) -> int:
    """Parses a size of at least 0 bytes; see `_size`."""
    return _size(text, 0)


def _size(text: str, least: int) -> int:
    """Parses bytes as GNU tools write them: `4096`, `4G` and `4GiB` (2³⁰ each), `4GB` (10⁹ each)."""
    match = SIZE.fullmatch(text) if text.isascii() else None
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 4G, 512MiB or 1000000, got {text!r}")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    size = int(Decimal(number) * base ** (" KMGT".index(prefix.upper()) if prefix else 0))
    if size < least:
        raise argparse.ArgumentTypeError(f"must be at least {least} bytes, got {text!r}")
    return size


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before the work whose results are to go there.

    Raises:
        CacheBlendError: names the option, the file and the reason.
    """
    if path is None or path == STANDARD_STREAM:
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
    """Writes a command's results, to stdout for `-`; numbers that are not finite, which JSON has none of, as null.

    Raises:
        CacheBlendError: the file cannot be written.
    """
    text = json.dumps(_with_null(report), indent=2, allow_nan=False) + "\n"
    if path == STANDARD_STREAM:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CacheBlendError(f"cannot write --json {path}: {reason_and_remedy(error)}") from error


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def load_with_bar(name: str | None, dtype: str | None) -> Model:
    """Loads a model, the bundled one for `None`, and shows how far it has come."""
    from cacheblend_jax.model.loading import loading_model

    with (
        progress_bar("load", unit="B", unit_scale=True) as advance,
        loading_model(BUNDLED if name is None else name, dtype=dtype, progress=advance) as loading,
    ):
        return loading.model()


def print_status(line: str) -> None:
    """Prints a line that is not a result: to stderr, unless that is to be quiet."""
    if not is_quiet():
        _print_to_stderr(line)


def print_warning(line: str) -> None:
    """Prints what users should know about a result, or about what they asked for: a line on stderr."""
    _print_to_stderr(f"cacheblend-jax: warning: {line}")


def print_error(line: str) -> None:
    """Prints an error that ends no command: a line on stderr."""
    _print_to_stderr(f"cacheblend-jax: error: {line}")


def _print_to_stderr(line: str) -> None:
    with line_erased():
        print(line, file=sys.stderr, flush=True)
