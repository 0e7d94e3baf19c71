"""The command `completion`: prints a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cacheblend_jax.errors import CacheBlendError

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `completion` to the command line's commands."""
    parser = commands.add_parser("completion", help="print a script that completes commands and options in a shell")
    parser.add_argument("shell", choices=SHELLS, help="which shell: bash, zsh or tcsh")
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Prints the script; the shell then asks no process of ours."""
    from cacheblend_jax.cli.main import COMMANDS, declared

    try:
        import shtab
    except ImportError as error:
        raise CacheBlendError(
            "completion needs the package shtab: install it with pip install 'cacheblend-jax[completion]'"
        ) from error
    parser, _ = declared(COMMANDS)
    sys.stdout.write(shtab.complete(parser, parsed.shell) + "\n")
    return {}
