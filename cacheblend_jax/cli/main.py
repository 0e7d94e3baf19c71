"""The command line `cacheblend-jax`: puts its commands together, runs one, and turns what happens into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version

import jax
from platformdirs import user_cache_path

from cacheblend_jax.cli import ask, bench, calibrate, demo, doctor, evaluate, precompute, store
from cacheblend_jax.cli.options import STANDARD_STREAM, OneLineParser, check_writable, write_json
from cacheblend_jax.errors import FULL, CacheBlendError, PromptTooLongError, one_line

# Each has `add_parser(commands)`, which declares it and returns its parser, and `run(parsed)`, which returns what
# `--json` writes, with an `"exit_code"` if that is not 0. `options.add_shared_options` adds what all of them take; the
# parser's default `shorten` ends the error of a prompt that is too long, with the options that help.
COMMANDS = (demo, ask, precompute, store, evaluate, bench, calibrate, doctor)
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; by default the process's own.

    Returns:
        The exit code: 0; 1 for a store that is damaged or could not be written; 2 for bad usage or input; 130 after an
        interrupt.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported: its advice concerns its models
    parsed = _parser().parse_args(arguments)
    try:
        check_writable("--json", parsed.json)
        if not parsed.no_compile_cache:
            _keep_compiled_programs()
        to_stdout = parsed.json == STANDARD_STREAM
        with redirect_stdout(sys.stderr) if to_stdout else nullcontext():
            report = parsed.run(parsed)
        if parsed.json is not None:
            write_json(parsed.json, report)
        sys.stdout.flush()
        return report.get("exit_code", 0)
    except BrokenPipeError:  # whoever read our output has stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush does not fail
        return 0
    except PromptTooLongError as error:
        print(f"cacheblend-jax: error: {error}{parsed.shorten}", file=sys.stderr)
        return 2
    except (CacheBlendError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        print(f"cacheblend-jax: error: {error}{'; free some space' if full else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted()
    except Exception:
        if (problem := _platform_problem()) is None:
            raise
        print(f"cacheblend-jax: error: {problem}", file=sys.stderr)
        return 2


def interrupted() -> int:
    """Says that the command was interrupted; returns its exit code."""
    print("cacheblend-jax: interrupted", file=sys.stderr)
    return INTERRUPTED


def _platform_problem() -> str | None:
    """Says why JAX has no device where JAX_PLATFORMS asks for some; JAX raises errors of several types."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return None
    try:
        jax.devices()
    except Exception as error:
        reason = "no device was found" if isinstance(error, AssertionError) else one_line(error)
        return f"JAX cannot use what JAX_PLATFORMS={platforms} asks for ({reason}); unset it, or set JAX_PLATFORMS=cpu"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="cacheblend-jax",
        description="Answers questions from texts whose KV is computed once and blended (CacheBlend).",
    )
    parser.set_defaults(shorten="")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('cacheblend-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def _keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory unless the user chose another."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache_path("cacheblend-jax") / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
