"""The command `inspect`: its example, users' documents, and what it refuses before any work."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import HF
from inspections import made_inspection

from cacheblend_jax.cli import inspect as inspect_module
from cacheblend_jax.cli.main import main
from cacheblend_jax.documents import Chunk
from cacheblend_jax.evaluation import inspection
from cacheblend_jax.evaluation.demo import EXAMPLE_CHUNKS, EXAMPLE_QUESTION

MODEL = ["--model", str(HF / "llama3")]
TEXT = "The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.\n\nCats purr at night."


def inspect(*options: str) -> int:
    return main(["inspect", "--no-compile-cache", *options])


@pytest.fixture
def docs(tmp_path) -> str:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "company.md").write_text(TEXT)
    return str(tmp_path / "docs")


@pytest.fixture
def inspected(monkeypatch) -> list:
    """Takes an inspection's place: no model computes anything; collects what was to be inspected."""
    calls = []

    def inspect(engine, prompt, *, chunk_names, **options):
        calls.append((engine, prompt, chunk_names, options))
        return made_inspection((4,) * len(chunk_names), chunk_names)

    monkeypatch.setattr(inspection, "inspect", inspect)
    return calls


@pytest.mark.once
def test_the_example_shows_what_reuse_loses(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plots, html, report = tmp_path / "new" / "plots", tmp_path / "report.html", tmp_path / "report.json"
    ratios = ["--ratios", "0.15", "--selectors", "query"]  # those of the blend itself: nothing more to compile
    assert inspect("--plot", str(plots), "--html", str(html), "--json", str(report), *ratios) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows[:5]] == ["mode", "full", "prefix", "reuse", "blend"]
    assert [row[-1] for row in rows[1:5]] == ["Oslo", "Oslo", "Lima", "Oslo"]
    assert sorted(path.name for path in plots.iterdir()) == [
        "attention.png",
        "deviation.png",
        "insights.png",
        "quality.png",
    ]
    assert all(f"drew {path}" in printed for path in plots.iterdir())
    assert "Cobalt" in html.read_text(encoding="utf-8")
    content = json.loads(report.read_text())
    assert content["question"] == EXAMPLE_QUESTION
    assert [part["name"] for part in content["parts"]] == ["prefix", "chunk 0", "chunk 1", "question"]
    assert content["kv_deviation"]["blend"] < content["kv_deviation"]["reuse"]
    assert [line["setting"] for line in content["ratios"]] == ["reuse", "query 0.15"]


def test_documents_are_those_that_ask_would_use(docs, inspected):
    question = "Where does Ana of the Cobalt team work?"
    chosen = ["--chunk-tokens", "40", "--top-k", "2", "--ratio", "0.3", "--selector", "hkvd", "--max-new-tokens", "5"]
    assert inspect(*MODEL, "--docs", docs, *chosen, question) == 0
    assert inspect(*MODEL, *chosen, "--docs", docs, question) == 0  # where argparse takes it for a path
    ((engine, prompt, names, options), (_, same_prompt, _, _)) = inspected
    assert (engine.blend.ratio, engine.blend.selector) == (0.3, "hkvd")
    assert names == ["company.md 0", "company.md 1"]
    assert len(prompt.chunks) == 2
    assert options["max_new_tokens"] == 5
    assert same_prompt == prompt


def test_files_that_are_called_alike_are_told_apart():
    sources = ["a/notes.md", "a/notes.md", "b/notes.md", "b/plan.md"]
    chunks = [Chunk("text", source, number) for number, source in enumerate(sources)]
    assert inspect_module._names(chunks) == ["a/notes.md 0", "a/notes.md 1", "b/notes.md 2", "plan.md 3"]


def test_another_model_reads_the_example(inspected):
    assert inspect(*MODEL) == 0
    ((engine, prompt, names, _),) = inspected
    decoded = [engine.model.tokenizer.decode(chunk).strip() for chunk in prompt.chunks]
    assert len(decoded) == len(EXAMPLE_CHUNKS)
    assert names == ["chunk 0", "chunk 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Where is Oslo?"], "--docs is missing; write inspect --docs PATH…"),
        (["--docs", "/nowhere", "Where?"], "'/nowhere' does not exist"),
        (["--ratio", "1.5"], "recompute_ratio must be in [0, 1], got 1.5"),
        (["--selector", "best"], "unknown selector 'best'"),
        (["--ratios", "0.1"], "--ratios draws quality against ratio, and needs --plot DIR"),
        (["--plot", "{tmp}/plots", "--ratios", "0.1", "2"], "recompute_ratio must be in [0, 1], got 2.0"),
        (["--plot", "{tmp}/plots", "--ratios", "0.1", "--selectors", "x"], "unknown selector 'x'"),
        (["--html", "/nowhere/report.html"], "cannot write --html /nowhere/report.html: /nowhere is not a directory"),
        (["--plot", "{tmp}/file"], "cannot make the pictures' directory"),
    ],
)
def test_what_makes_no_sense_is_named_before_any_work(options, message, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(inspect_module, "load_reader", None)
    (tmp_path / "file").touch()
    assert inspect(*(option.format(tmp=tmp_path) for option in options)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("command", ["inspect", "demo", "evaluate"])
def test_without_matplotlib_a_command_says_so_before_any_work(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for module in ("inspect.load_reader", "demo.load_with_bar", "evaluate.load_with_bar"):
        monkeypatch.setattr(f"cacheblend_jax.cli.{module}", None)
    assert main([command, "--no-compile-cache", "--plot", str(tmp_path / "plots")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cacheblend-jax: error: pictures need matplotlib: pip install 'cacheblend-jax[plots]'")


def test_a_report_needs_no_matplotlib(inspected, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert inspect(*MODEL, "--html", str(tmp_path / "report.html")) == 0
    assert (tmp_path / "report.html").stat().st_size > 5000
