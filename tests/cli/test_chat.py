"""The command `chat`, through pipes: turns that go on from each other's KV, commands, and interrupts."""

from __future__ import annotations

import io
import json
import sys

import pytest
from conftest import HF, unchecked

import cacheblend_jax as cb
from cacheblend_jax.cli.answering import print_as_it_comes, print_dim
from cacheblend_jax.cli.main import main
from cacheblend_jax.engine.growing_text import GrowingText

QUESTION = "Where does Ana of the Cobalt team work?"


@pytest.fixture
def chat(tmp_path, monkeypatch, capsys):
    """Runs `chat` on lines; returns its exit code, its turns, and what it printed."""
    (tmp_path / "company.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.\n\nCats purr.")

    def run(*lines: str | bytes, options: tuple[str, ...] = ()):
        content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
        model = ["--model", str(HF / "llama3"), "--no-compile-cache", "--docs", str(tmp_path / "company.md")]
        common = ["--chunk-tokens", "40", "--max-new-tokens", "4", "--top-k", "2", "--selector", "hkvd"]
        code = main(["chat", *model, *common, *options, "--json", str(tmp_path / "chat.json")])
        printed = capsys.readouterr()
        turns = json.loads((tmp_path / "chat.json").read_text())["turns"] if code == 0 else None
        return code, turns, printed.out, printed.err

    return run


def test_a_conversation_goes_on_from_its_own_kv(chat):
    code, turns, out, err = chat(QUESTION, "", "And Ana?", "/sources", "/why")
    assert (code, err) == (0, "")
    first, second = (turn["answer"] for turn in turns)
    assert first["prefill"]["mode"] == "blend"
    assert second["prefill"]["mode"] == "extend"
    kept = first["prefill"]["tokens"] + len(first["token_ids"])
    assert second["prefill"]["exact"] in (kept - 1, kept)
    assert second["prefill"]["tokens"] > kept
    lines = out.splitlines()
    assert first["text"].split("\n")[0] in lines[0]
    costs = [line for line in lines if line.startswith("[TTFT")]
    assert [("chunks hit" in cost, "tokens kept" in cost) for cost in costs] == [(True, False), (False, True)]
    assert all("full prefill" in cost for cost in costs)
    assert out.count("company.md, chunk ") == 2
    assert "tokens decoded" in lines[-1]


def test_commands_change_what_comes_and_errors_end_no_conversation(chat):
    lines = ("/sources", "/why", "/ratio 2", "/ratio much", "/mode fast", "/nothing", b"O\xf9?")
    code, turns, out, err = chat(*lines, QUESTION, "/ratio 0.5", QUESTION, "/mode full", QUESTION, "/new", "/help")
    assert code == 0
    assert out.startswith("no question has chosen any yet\nno answer yet\n")
    assert [line.split("error: ")[1].split(",")[0] for line in err.splitlines()] == [
        "recompute_ratio must be in [0",
        "/ratio must be a ratio in [0",
        "/mode must be one of full",
        "there is no '/nothing'; /help lists what there is",
        "the question must be valid Unicode",
    ]
    first, blend, full = (turn["answer"]["prefill"] for turn in turns)
    assert (first["mode"], blend["mode"], full["mode"]) == ("blend", "blend", "full")
    assert (first["hits"], first["candidates"]) == (0, 0)  # its chunks are stored after the answer
    assert blend["recompute_ratio"] == pytest.approx(0.5, abs=0.05)
    assert "Ctrl-C stops an answer" in out


def test_an_interrupt_stops_an_answer_and_not_the_program(chat, monkeypatch):
    added, add = [], GrowingText.add

    def interrupted(self, token: int) -> str:
        added.append(token)
        if len(added) == 3:
            raise KeyboardInterrupt
        return add(self, token)

    monkeypatch.setattr(GrowingText, "add", interrupted)
    code, turns, _, err = chat(QUESTION, "And Ana?")
    assert (code, err) == (0, "stopped; Ctrl-D ends the program\n")
    stopped, after = (turn["answer"] for turn in turns)
    assert len(stopped["token_ids"]) <= 3
    assert after["prefill"]["mode"] == "extend"
    assert len(after["token_ids"]) == 4


def test_an_interrupt_while_the_question_is_prefilled_leaves_what_was_said(chat, monkeypatch):
    extend = cb.Engine.extend
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return extend(self, *arguments)

    monkeypatch.setattr(cb.Engine, "extend", interrupted)
    code, turns, _, err = chat(QUESTION, "And Ana?", "And Ana?")
    assert (code, err) == (0, "stopped; Ctrl-D ends the program\n")
    assert [turn["answer"]["prefill"]["mode"] for turn in turns] == ["blend", "extend"]


def test_a_conversation_longer_than_the_model_begins_anew(chat):
    most = cb.load_model(HF / "llama3").config.max_positions
    code, turns, _, err = chat(QUESTION, "word " * most, QUESTION)
    assert code == 0
    anew, too_long = err.splitlines()
    assert anew.startswith(f"the model takes {most} tokens, and the conversation has ")
    assert anew.endswith(": a new one begins")
    assert f"tokens, but the model takes at most {most}" in too_long
    assert [turn["answer"]["prefill"]["mode"] for turn in turns] == ["blend", "blend"]


def test_answers_are_printed_while_they_are_decoded(capsys):
    class Stream:
        generation = "the answer"

        def __iter__(self):
            yield 1, "Os"
            assert capsys.readouterr().out == "Os"
            yield 2, "lo"
            assert capsys.readouterr().out == "lo"

    with unchecked():
        assert print_as_it_comes(Stream()) == "the answer"
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("terminal", "no_color", "printed"), [(True, "", "\x1b[2mx\x1b[0m"), (True, "1", "x"), (False, "", "x")]
)
def test_a_line_is_dimmed_on_a_terminal_that_wants_colours(terminal, no_color, printed, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    print_dim("x")
    assert capsys.readouterr().out == f"{printed}\n"
