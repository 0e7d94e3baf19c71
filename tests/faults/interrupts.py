"""Ctrl-C at random times: the command ends at once and cleanly, whatever it was doing, and its store stays whole."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterable
from pathlib import Path

from store_cases import ROOT, report_of, start_python

from faults import require
from faults.directory import tell

# Forks of one process run the command, so that the time of importing is spent once; each ends as any process does.
COMMAND = """
import os, random, signal, time
from pathlib import Path
if sys.argv[4] == "as users":
    os.environ.pop("XLA_FLAGS", None)
import jax
import cacheblend_jax.cli.process as command_line
root, rng, whole = Path(sys.argv[1]), random.Random(int(sys.argv[2])), {}
arguments = ["ask", "--model", sys.argv[3], "--docs", str(root / "docs"), "--all", "--chunk-tokens", "40"]
arguments += ["--max-new-tokens", "8", "--store", str(root / "kv"), "--no-compile-cache", "Who is it?"]

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it

def start(compiles):
    pid = os.fork()
    if pid:
        return pid
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(root / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if compiles:
        jax.config.update("jax_compilation_cache_dir", None)
    sys.argv[1:] = arguments
    command_line.run()

def end(pid, deadline):
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None

for line in sys.stdin:
    compiles = int(line) % 2 == 1
    if compiles not in whole:
        began = time.monotonic()
        assert end(start(compiles), began + 600) == 0, (root / "err").read_text()
        whole[compiles] = time.monotonic() - began
    began, delay = time.monotonic(), rng.uniform(0.02, 1.0) * whole[compiles]
    pid = start(compiles)
    code = end(pid, began + delay)
    if code is None:
        os.kill(pid, signal.SIGINT)
        code = end(pid, time.monotonic() + 120)
    else:
        whole[compiles] = min(time.monotonic() - began, whole[compiles])
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print("hang" if code is None else code, delay, flush=True)
"""
MODEL = ROOT / "tests" / "data" / "hf" / "llama3"
TEXT = "Ana joined the Cobalt team in Oslo. " * 9


def interrupts(directory: Path, rounds: Iterable[int], seed: int = 0, *, quickly: bool = False) -> dict[str, int]:
    """Interrupts `ask` at some instant in each round; in odd ones it has all programs to compile, so that it is in XLA.

    It ends with exit code 130 and one line, or 0 where it had its answer before the interrupt came, or by the signal
    itself where Python had already left its handler. Its store then has no problem.

    Args:
        quickly: compile by the flags that tests do, which leaves interrupts less of XLA's time to come in.
    """
    (directory / "docs").mkdir(parents=True)
    (directory / "docs" / "text.md").write_text(TEXT)
    commands = start_python(COMMAND, directory, seed, MODEL, "quickly" if quickly else "as users")
    counts = collections.Counter(interrupts=0, interrupted=0, answered=0)
    for round_ in rounds:
        shutil.rmtree(directory / "kv", ignore_errors=True)
        tell(commands, round_)
        line = commands.stdout.readline().decode().split()
        if not line:  # it has ended
            break
        code, delay = line
        printed, errors = ((directory / name).read_text() for name in ("out", "err"))
        where = f"round {round_}, after {float(delay):.2f} s: exit code {code}\n{printed}{errors}"
        require(code in ("0", "130", "-2"), where)
        if code == "130":
            require("interrupted" in errors and "Traceback" not in errors, where)
        else:
            require("TTFT" in printed, where)
        if (directory / "kv").is_dir():
            problems = report_of(directory / "kv")["problems"]
            require(problems == [], where, problems)
        counts.update(interrupts=1, interrupted=code == "130", answered=code != "130")
    _, errors = commands.communicate(timeout=60)
    require(commands.returncode == 0, errors.decode())
    return dict(counts)
