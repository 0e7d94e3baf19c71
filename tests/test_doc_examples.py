"""The examples of README and docs: Python runs, in the documents' order and one namespace; commands are parsed.

The guide's pages run in `tests/test_docs.py`, each by itself; here their commands are parsed.

`<!-- not run: why -->` on the line before a block of Python leaves it out.
"""

from __future__ import annotations

import itertools
import re
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from cacheblend_jax.cli.main import main, parser_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


class Block(NamedTuple):
    document: Path
    line: int  # of its first line, from 0
    text: str
    marked: bool


def blocks(language: str, documents: list[Path]) -> list[Block]:
    found = []
    for document in documents:
        lines = document.read_text(encoding="utf-8").splitlines()
        for start in (number for number, line in enumerate(lines, 1) if line.strip() == f"```{language}"):
            stop = next(number for number in range(start, len(lines)) if lines[number].strip() == "```")
            before = next((line for line in reversed(lines[: start - 1]) if line.strip()), "")
            found.append(Block(document, start, "\n".join(lines[start:stop]), bool(NOT_RUN.fullmatch(before.strip()))))
    return found


def commands() -> list[list[str]]:
    """Returns the commands of all shell blocks, as words; `&&` separates commands, and `>` ends one."""
    shell = blocks("sh", DOCUMENTS + GUIDE)
    words = [shlex.split(line, comments=True) for block in shell for line in block.text.splitlines()]
    split = []
    for line in filter(None, words):
        starts = [0, *(place + 1 for place, word in enumerate(line) if word == "&&")]
        stops = [*(start - 1 for start in starts[1:]), len(line)]
        each = [line[start:stop] for start, stop in zip(starts, stops, strict=True)]
        split += [list(itertools.takewhile(lambda word: word != ">", command)) for command in each]
    return split


def test_python_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [block for block in blocks("python", DOCUMENTS) if not block.marked]
    assert len(examples) >= 4
    namespace: dict = {}
    with ExitStack() as opened:
        for block in examples:  # blank lines in front, so that a traceback has the document's line numbers
            exec(compile("\n" * block.line + block.text, str(block.document), "exec"), namespace)
            namespace["store"].flush()  # the next may look at its files
            opened.callback(namespace["store"].close)
            opened.callback(namespace["engine"].close)
    assert main(["store", "verify", "kv/"]) == 0


@pytest.mark.parametrize("command", [words for words in commands() if "cacheblend-jax" in words], ids=" ".join)
def test_commands_have_the_options_that_they_name(command):
    arguments = command[command.index("cacheblend-jax") + 1 :]
    assert parser_of(arguments).parse_args(arguments).run is not None


def test_scripts_and_tests_that_commands_name_are_there():
    named = {word for command in commands() for word in command if re.fullmatch(r"(scripts|tests)/\S+\.py", word)}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
