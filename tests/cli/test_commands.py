"""How commands are put together: each has the same two functions, and nothing below them knows of the command line."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import cacheblend_jax
from cacheblend_jax.cli.main import COMMANDS

PACKAGE = Path(cacheblend_jax.__file__).parent


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_every_command_is_declared_and_run_alike(command):
    assert list(inspect.signature(command.add_parser).parameters) == ["commands"]
    assert list(inspect.signature(command.run).parameters) == ["parsed"]


def test_nothing_below_the_command_line_knows_of_it():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli" or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            known = [name for name in names if name == "argparse" or name.startswith("cacheblend_jax.cli")]
            assert not known, f"{path.relative_to(PACKAGE)} imports {known[0]}"
