"""How far long work has come, where stderr is no terminal."""

from __future__ import annotations

import sys
import threading

import pytest

from cacheblend_jax.cli import progress as progress_module
from cacheblend_jax.cli.progress import progress, progress_bar


class Written:
    """Stands for stderr; `line` waits for the next one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._new = threading.Event()

    def write(self, text: str) -> int:
        if text.strip():
            self.lines.append(text)
            self._new.set()
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def line(self) -> str:
        self._new.clear()
        assert self._new.wait(60)
        return self.lines[-1]


def captured(monkeypatch) -> Written:
    written = Written()
    monkeypatch.setattr(sys, "stderr", written)  # not in a fixture: pytest sets it anew before the test itself
    return written


@pytest.fixture
def often(monkeypatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cacheblend-progress"]


@pytest.mark.usefixtures("often")
def test_a_log_file_gets_a_line_every_so_often_even_while_nothing_moves(monkeypatch):
    stderr = captured(monkeypatch)
    with progress_bar("load", unit="B", unit_scale=True) as advance:
        assert stderr.line().startswith("load: 0.00B, ")
        assert stderr.line().startswith("load: 0.00B, ")
        advance(3 * 10**6, 10**9)
        stderr.line()
        assert stderr.line().startswith("load: 3.00MB of 1.00GB, ")
    assert threads() == []


@pytest.mark.usefixtures("often")
def test_items_are_counted_as_they_are_taken(monkeypatch):
    stderr = captured(monkeypatch)
    for number, _ in enumerate(progress(["a", "b", "c"], "evaluate")):
        stderr.line()
        assert f"evaluate: {number} of 3, " in stderr.line()
    assert threads() == []


def test_what_is_quick_prints_nothing(monkeypatch):
    stderr = captured(monkeypatch)
    assert list(progress(iter("ab"), "split")) == ["a", "b"]
    with pytest.raises(KeyError), progress_bar("load"):
        raise KeyError
    for _ in progress("abc", "left early"):
        break
    assert (stderr.lines, threads()) == ([], [])
