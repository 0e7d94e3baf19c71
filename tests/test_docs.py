"""The guide and the notebook: code on the guide's pages runs, the notebook is its source's, and links name one place.

`<!-- not run: why -->` on the line before a block leaves it out, as in README. CI builds the guide, and runs the
notebook.
"""

from __future__ import annotations

import functools
import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
NOTEBOOK = ROOT / "docs" / "notebooks" / "colab.ipynb"
BLOCK = re.compile(
    r"(?P<mark>^<!-- not run: [^\n]+ -->\n+)?^```(?P<language>python|sh)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line, from 0


def blocks_to_run(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["mark"] is None:
            yield Block(match["language"], match["text"], text.count("\n", 0, match.start("text")))


@pytest.mark.once
@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_code_of_the_guide_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cb, "load_model", bundled_model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"In which city is the office of Reyes?\n")))
    namespace: dict = {}
    for block in blocks_to_run(page):
        if block.language == "python":  # blank lines in front, so that a traceback has the page's line numbers
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            continue
        for words in (shlex.split(line, comments=True) for line in block.text.splitlines()):
            if words[:1] == ["cacheblend-jax"]:
                assert main(words[1:]) == 0, (words, capsys.readouterr().err)


@functools.cache
def bundled_model(name: str, **options) -> cb.Model:
    """Pages that load the same model share its programs."""
    return cb.model.load_model(name, **options)


def script_cells(script: str) -> list[tuple[str, str]]:
    """Reads jupytext's percent format: cells begin with `# %%`; text and shell commands are comments."""
    _header, *parts = re.split(r"^# %%(.*)$\n", script, flags=re.MULTILINE)
    cells = []
    for kind, body in zip(parts[0::2], parts[1::2], strict=True):
        if "[markdown]" in kind:
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE)))
        else:
            cells.append(("code", re.sub(r"^# (?=[!%])", "", body.strip("\n"), flags=re.MULTILINE)))
    return cells


def test_the_notebook_is_what_its_source_makes():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == script_cells(NOTEBOOK.with_suffix(".py").read_text(encoding="utf-8"))
    assert len(cells) > 20


def test_the_notebook_shows_a_whole_run():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "error" not in printed
    assert re.search(r"/(home|root|tmp|Users)/", printed) is None  # of whoever ran it


def test_links_to_the_repository_are_those_of_pyproject():
    url = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    name = url.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{name}/blob/main/docs/notebooks/colab.ipynb"
    script = NOTEBOOK.with_suffix(".py").read_text(encoding="utf-8")
    for text in (script, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.findall(r"https://colab\.research\.google\.com/github/[^)\s]+", text) == [badge]
    to_github = re.findall(r"https://github\.com/[^)\s\"]+", script)
    assert url in to_github
    documents = [link.removeprefix(f"{url}/blob/main/") for link in to_github if link != url]
    assert documents
    assert [path for path in documents if not (ROOT / path).is_file()] == []
