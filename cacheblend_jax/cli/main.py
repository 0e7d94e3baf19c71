"""The command line `cacheblend-jax`: puts its commands together, runs one, and turns what happens into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from platformdirs import user_cache_path

from cacheblend_jax.cli.defaults import configuration_path, set_defaults_of_user
from cacheblend_jax.cli.options import STANDARD_STREAM, OneLineParser, check_writable, write_json
from cacheblend_jax.cli.stderr import messages
from cacheblend_jax.errors import FULL, CacheBlendError, PromptTooLongError, one_line
from cacheblend_jax.runtime.user_cache import PROGRAMS, WEIGHTS, keep

# What `--help` says of each command, as its own parser does. A command's module, in this package, has
# `add_parser(commands)`, which declares it and returns its parser, and `run(parsed)`, which returns what `--json`
# writes, with an `"exit_code"` if that is not 0. `options.add_shared_options` adds what all of them take; the parser's
# default `shorten` ends the error of a prompt that is too long, with the options that help.
COMMANDS = {
    "demo": "ask the bundled model in every mode",
    "ask": "answer a question from text files",
    "chat": "talk about text files",
    "inspect": "show token by token what reuse loses and a blend restores",
    "serve": "answer OpenAI's clients over HTTP",
    "precompute": "compute the KV of text files and keep it in a directory",
    "store": "look after a directory of stored chunks",
    "evaluate": "measure quality on a data set, by mode, selector and ratio",
    "bench": "time the modes against each other",
    "calibrate": "measure what --ratio auto decides by: layer steps and tiers",
    "plan": "estimate memory, TTFT, throughput and cost of a service",
    "completion": "print a script that completes commands and options in a shell",
    "doctor": "show devices, versions, and which kernels are used and why",
}
INTERRUPTED = 130
UNBOUNDED = -1  # as JAX says it
COMPILED_BYTES = 4 * 2**30  # of programs kept on disk: the least recently used go first


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; by default the process's own.

    Returns:
        The exit code: 0; 1 for a store that is damaged or could not be written; 2 for bad usage or input; 130 after an
        interrupt.
    """
    words = sys.argv[1:] if arguments is None else arguments
    shorten = ""
    try:
        parsed = parser_of(words).parse_args(words)
        shorten = parsed.shorten
        check_writable("--json", parsed.json)
        if not parsed.no_compile_cache:
            _keep_compiled_programs()
        if not parsed.no_weight_cache:
            keep(WEIGHTS)
        to_stdout = parsed.json == STANDARD_STREAM
        with (
            messages(quiet=parsed.quiet, verbose=parsed.verbose),
            redirect_stdout(sys.stderr) if to_stdout else nullcontext(),
        ):
            report = parsed.run(parsed)
        if parsed.json is not None:
            write_json(parsed.json, report)
        sys.stdout.flush()
        return report.get("exit_code", 0)
    except BrokenPipeError:  # whoever read our output has stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush does not fail
        return 0
    except PromptTooLongError as error:
        print(f"cacheblend-jax: error: {error}{shorten}", file=sys.stderr)
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
        import jax

        jax.devices()
    except Exception as error:
        reason = "no device was found" if isinstance(error, AssertionError) else one_line(error)
        return f"JAX cannot use what JAX_PLATFORMS={platforms} asks for ({reason}); unset it, or set JAX_PLATFORMS=cpu"
    return None


def parser_of(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser of a command line: of its command alone, the module is imported and the options declared.

    Raises:
        CacheBlendError: what the user's configuration file says of the options cannot be used.
    """
    named = next((word for word in arguments if not word.startswith("-")), None)
    parser, parsers = declared([named] if named in COMMANDS else [])
    for name, own in parsers.items():
        set_defaults_of_user(own, name, COMMANDS)
    return parser


def declared(names: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser, and those of the named commands; others are declared without options."""
    parser = OneLineParser(
        prog="cacheblend-jax",
        description="Answers questions from texts whose KV is computed once and blended (CacheBlend).",
        epilog=f"Defaults of options may stand in {configuration_path()}.",
    )
    parser.set_defaults(shorten="", json=None, no_compile_cache=True, no_weight_cache=True, quiet=False, verbose=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('cacheblend-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {}
    for name, help_text in COMMANDS.items():
        if name not in names:
            commands.add_parser(name, help=help_text)
            continue
        command = module_of(name)
        parsers[name] = command.add_parser(commands)
        parsers[name].set_defaults(run=command.run)
    return parser, parsers


def module_of(command: str) -> ModuleType:
    """Returns the module of a command."""
    return import_module(f"cacheblend_jax.cli.{command}")


def _keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory unless the user chose another.

    There, what spares tracing for it is kept in any case.
    """
    import jax

    keep(PROGRAMS)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache_path("cacheblend-jax") / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
        if jax.config.jax_compilation_cache_max_size == UNBOUNDED:  # type: ignore[attr-defined]
            jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
