"""Data sets: the forms that are read, and what is said of malformed rows."""

from __future__ import annotations

import json

import pytest

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.datasets import load_rows


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def rows_of(source, **options):
    return load_rows(source, limit=None, chunk_tokens=4, count_tokens=lambda text: len(text.split()), **options)


def test_the_authors_form_and_longbench_are_read(tmp_path):
    passages = [{"title": "A", "text": "one"}, {"text": "two"}]
    authors = write(tmp_path / "musique.json", [{"question": "q", "answers": ["x", "y"], "ctxs": passages}])
    (row,) = rows_of(authors)
    assert (row.question, row.answers, row.chunks) == ("q", ("x", "y"), ("A\none", "two"))
    line = {"input": "q", "context": "one two three\n\nfour five six", "answers": ["x"], "dataset": "d"}
    longbench = write(tmp_path / "samsum.jsonl", json.dumps(line) + "\n\n" + json.dumps(line | {"input": ""}) + "\n")
    first, second = rows_of(longbench)
    assert first.chunks == ("one two three", "four five six")
    assert first.kind == "d"
    assert second.question  # a summary's
    (broken,) = rows_of(write(tmp_path / "lines.jsonl", LINE.replace('"c"', '"one\u2028two"')))
    assert "one\u2028two" in broken.chunks[0]


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "marked.jsonl").write_text(LINE + "\n" + LINE, encoding="utf-8-sig")
    assert [row.name for row in rows_of(str(tmp_path / "marked.jsonl"))] == ["marked/0", "marked/1"]


GOOD = {"question": "q", "answers": ["x"], "ctxs": [{"text": "t"}]}


LINE = '{"input": "q", "context": "c", "answers": ["x"]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", [], "a.json holds no rows"),
        ("a.json", [1], "row 0 must be an object, got int"),
        ("a.json", [GOOD, GOOD | {"ctxs": []}], "row 1: field 'ctxs' is empty"),
        ("a.json", [{"question": "q", "ctxs": [{"text": "t"}]}], "row 0: field 'answers' is missing"),
        ("a.json", [GOOD | {"answers": [[]]}], "row 0: field 'answers' is empty"),
        ("a.json", [GOOD | {"answers": "x"}], "field 'answers' must be a list, got str"),
        ("a.json", [GOOD | {"question": 3}], "field 'question' must be text, got int"),
        ("a.json", [GOOD | {"ctxs": [{"title": "t"}]}], "row 0, ctxs 0: field 'text' is missing"),
        ("a.json", [{"question": "q", "answers": ["x"]}], "row 0: field 'context' is missing"),
        ("a.jsonl", LINE + '\n{"inp', "row 1 is not JSON"),
        ("a.json", "[" * 100_000, "a.json is not JSON: maximum recursion"),
        ("a.jsonl", LINE + "\n" + "1" * 5000, "row 1 is not JSON: Exceeds the limit"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, content, message):
    with pytest.raises(CacheBlendError, match=message):
        rows_of(write(tmp_path / name, content))


def test_no_such_data_set():
    with pytest.raises(CacheBlendError, match="neither a file nor 'bundled'"):
        rows_of("nowhere.json")
