"""The command's process: its streams, and how it ends: by its exit code, or, interrupted, at once."""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import subprocess
import sys

import pytest

from cacheblend_jax.cli import process as command_line
from cacheblend_jax.cli.collecting import ALLOCATIONS, rarely_collecting


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def at_exit(monkeypatch):
    """What is to be called when the process ends; it isn't called when that of the tests does."""
    calls = []
    monkeypatch.setattr(atexit, "register", calls.append)
    return calls


@pytest.fixture
def ended_at_once(monkeypatch, at_exit):
    codes = []

    def end(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return codes


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_command_ends_its_process_with_its_exit_code(monkeypatch, ended_at_once, code):
    monkeypatch.setattr(command_line, "main", lambda: code)
    with pytest.raises(SystemExit) as error:
        command_line.run()
    assert error.value.code == code
    assert ended_at_once == []


def test_a_command_that_has_ended_does_not_wait_for_the_interpreter_to_be_taken_down(
    monkeypatch, ended_at_once, at_exit
):
    monkeypatch.setattr(command_line, "main", lambda: 2)
    with pytest.raises(SystemExit):
        command_line.run()
    (end,) = at_exit
    with pytest.raises(Ended):
        end()
    assert ended_at_once == [2]


def test_stdout_takes_what_its_encoding_lacks(monkeypatch, ended_at_once):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    monkeypatch.setattr(command_line, "main", lambda: print("caf\u00e9 in \u6771\u4eac", flush=True) or 0)
    with pytest.raises(SystemExit):
        command_line.run()
    assert printed.getvalue() == b"caf\xe9 in ??" + os.linesep.encode()


def test_closed_streams_are_no_error(monkeypatch, ended_at_once):
    def main():
        print("answer")
        print("progress", file=sys.stderr, flush=True)
        return len(sys.stdin.read())

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(command_line, "main", main)
    with pytest.raises(SystemExit) as error:
        command_line.run()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    assert error.value.code == 0


def test_an_unhandled_error_is_reported_by_the_interpreter(monkeypatch, ended_at_once, at_exit):
    def main():
        raise ValueError("no")

    monkeypatch.setattr(command_line, "main", main)
    with pytest.raises(ValueError, match="no"):
        command_line.run()
    (end,) = at_exit
    end()
    assert ended_at_once == []


PROCESS = """
import atexit, sys, threading, time
from cacheblend_jax.cli import process

def late():
    time.sleep(0.2)
    print("a thread,", end=" ")

def main():
    atexit.register(lambda: print("what was registered"))
    threading.Thread(target=late).start()
    print("an answer,", end=" ")
    return 3

class Left:
    def __del__(self):
        print("and what is taken down")

left = Left()
process.main = main
process.run()
"""


def test_what_is_to_run_at_the_end_runs_but_nothing_is_taken_down():
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "an answer, a thread, what was registered\n"


def test_collecting_rarely_ends_with_its_body():
    before = gc.get_threshold()
    gc.set_threshold(700, 11, 12)
    try:
        with rarely_collecting():
            assert gc.get_threshold() == (ALLOCATIONS, 11, 12)
        assert gc.get_threshold() == (700, 11, 12)
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("escapes", [False, True])
def test_an_interrupted_command_does_not_wait_for_its_threads(monkeypatch, ended_at_once, capsys, escapes):
    def main():
        print("half an answer", end="")
        if escapes:  # a second interrupt, while the first is reported
            raise KeyboardInterrupt
        return command_line.INTERRUPTED

    monkeypatch.setattr(command_line, "main", main)
    with pytest.raises(Ended):
        command_line.run()
    assert ended_at_once == [130]
    assert capsys.readouterr().out == "half an answer"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_an_interrupt_lost_in_a_finalizer_comes_again(monkeypatch, ended_at_once, capsys):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main():
        Interrupted()  # gone at once; Python ignores what its finalizer raises
        signal.pause()
        return 0

    before = sys.unraisablehook
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of shells ignore it
    monkeypatch.setattr(command_line, "main", main)
    try:
        with pytest.raises(Ended):
            command_line.run()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert ended_at_once == [130]
    assert sys.unraisablehook is before
    assert capsys.readouterr().err == "cacheblend-jax: interrupted\n"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_other_errors_in_finalizers_are_reported_as_ever(monkeypatch, ended_at_once):
    class Faulty:
        def __del__(self):
            raise ValueError("no")

    def main():
        Faulty()
        return 0

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_type))
    monkeypatch.setattr(command_line, "main", main)
    with pytest.raises(SystemExit):
        command_line.run()
    assert reported == [ValueError]
