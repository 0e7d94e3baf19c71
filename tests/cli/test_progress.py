"""How far long work has come, where stderr is no terminal."""

from __future__ import annotations

import sys
import threading

import pytest

from cacheblend_jax.cli import progress as progress_module
from cacheblend_jax.cli.options import print_status
from cacheblend_jax.cli.progress import progress, progress_bar, progress_of_parts


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
        assert self._new.wait(300)
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


class Terminal(Written):
    """Stands for stderr on a terminal; keeps what is visible of each line as it is drawn."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return super().write(text.replace(progress_module.ERASE, "")) and len(text)


@pytest.mark.parametrize("stderr", [Written, Terminal])
def test_pieces_of_work_are_shown_together_until_they_are_done(monkeypatch, stderr):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.001)
    monkeypatch.setattr(progress_module, "REDRAWN_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", written := stderr())

    def shown() -> str:
        written.line()
        return written.line().strip().rpartition(", ")[0]

    with progress_of_parts() as parts:
        loaded = parts.part("loading weights", unit="B", unit_scale=True)
        assert shown() == "loading weights"
        loaded(27 * 10**7, 54 * 10**7)
        compiled = parts.part("compiling")
        compiled(3, 7)
        assert shown() == "loading weights 270MB of 540MB, compiling 3 of 7"
        loaded(54 * 10**7, 54 * 10**7)
        assert shown() == "compiling 3 of 7"
        compiled(7, 7)
        for _ in parts.items("abc", "precomputing"):
            pass
        assert shown() == "working"
    assert threads() == []


def test_a_line_that_is_rewritten_makes_room_for_others(monkeypatch):
    monkeypatch.setattr(progress_module, "REDRAWN_SECONDS", 3600)
    monkeypatch.setattr(sys, "stderr", written := Terminal())
    with progress_of_parts():
        assert written.lines == ["working, 0 s"]
        print_status("a warning")
        assert written.lines[-1] == "a warning"
    assert progress_module.ERASE not in "".join(written.lines)
