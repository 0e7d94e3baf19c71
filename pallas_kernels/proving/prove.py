"""Proves the Pallas backends on a device: each is tried in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.attention.api import BACKENDS as ATTENTION_BACKENDS
from pallas_kernels.blending.api import BACKENDS as BLENDING_BACKENDS
from pallas_kernels.dispatch import OVERRIDE, pallas_backends, wrong_platform
from pallas_kernels.proving.identity import identity_of
from pallas_kernels.target import Device, Target, target_of
from pallas_kernels.verdicts import Failure, Verdict, Verdicts

LIMIT_SECONDS = 300.0
BACKENDS = {"selective_attention": ATTENTION_BACKENDS, "blend_kv": BLENDING_BACKENDS}
Command = Callable[[str, str, Target], Sequence[str]]
NO_MEMORY = "Out of memory while trying to allocate"


class UnprovenError(RuntimeError):
    """Nothing can be said of the kernels for now: no free memory on the device, say. Not to be remembered."""


@dataclass(frozen=True)
class Outcome:
    """What a child process said, and how it ended.

    Attributes:
        is_ready: it had the device and the memory that it needs.
        reason: why it came to no verdicts; `None` if it did.
    """

    is_ready: bool
    verdicts: tuple[Verdict, ...] = ()
    reason: str | None = None


def child_command(operation: str, backend: str, target: Target) -> Sequence[str]:
    """Returns the command that tries a backend; see `child.py`."""
    # -P: a package of the same name in the current directory is none of ours.
    return [
        sys.executable,
        "-P",
        "-m",
        "pallas_kernels.proving.child",
        operation,
        backend,
        target.platform,
        target.chip,
    ]


def backends_to_try(target: Target) -> list[tuple[str, str]]:
    """Returns each operation's backends that can run on a device."""
    able = [name for name in pallas_backends(target) if wrong_platform(name, target) is None]
    return [(operation, name) for operation, backends in BACKENDS.items() for name in able if name in backends]


def prove(
    device: Device,
    *,
    limit_seconds: float = LIMIT_SECONDS,
    command: Command = child_command,
    progress: Callable[[str, str, Outcome], None] = lambda operation, backend, outcome: None,
) -> Verdicts:
    """Tries every Pallas backend on a device, each in a process of its own, one after another.

    Args:
        limit_seconds: of each process; one that takes longer is killed.
        command: starts such a process.
        progress: called after each.

    Raises:
        UnprovenError: the device has no memory to spare, or can't be opened by another process.
    """
    target = target_of(device)
    verdicts: list[Verdict] = []
    failures: list[Failure] = []
    for operation, backend in backends_to_try(target):
        outcome = _run(command(operation, backend, target), _environment(device), limit_seconds)
        progress(operation, backend, outcome)
        if not outcome.is_ready:
            raise UnprovenError(outcome.reason)
        _check_memory(outcome)
        verdicts += outcome.verdicts
        if outcome.reason is not None:
            failures.append(Failure(operation, backend, outcome.reason))
    return Verdicts(target, identity_of(device), tuple(verdicts), tuple(failures))


def _check_memory(outcome: Outcome) -> None:
    problems = [outcome.reason, *(verdict.problem for verdict in outcome.verdicts)]
    if lacking := next((problem for problem in problems if problem and NO_MEMORY in problem), None):
        raise UnprovenError(lacking)


def _environment(device: Device) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != OVERRIDE}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    # Beside a process that has taken three quarters of the memory, as JAX does.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}
    if device.platform == "gpu":  # a context on each GPU would take memory from all
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = getattr(device, "local_hardware_id", None) or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return environment


def _run(command: Sequence[str], environment: dict[str, str], limit_seconds: float) -> Outcome:
    """Runs a child process to its end, or ends it."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        try:
            written, complaints = child.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            written, complaints = child.communicate()
            return _outcome(written, f"ran for more than {limit_seconds:g} s")
        except BaseException:
            child.kill()
            raise
    if child.returncode == 0:
        return _outcome(written, "said nothing of its results")
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"exited with {child.returncode}"
    return _outcome(written, f"{how}: {_last_line(complaints)}")


def _outcome(written: str, otherwise: str) -> Outcome:
    """Returns what a child's lines say; `otherwise` is the reason where they hold no verdicts."""
    is_ready, doing = False, "starting"
    for said in _said(written):
        is_ready |= bool(said.get("ready"))
        doing = said.get("doing", doing)
        if "verdicts" in said:
            return Outcome(True, tuple(Verdict(**verdict) for verdict in said["verdicts"]))
    return Outcome(is_ready, reason=f"{otherwise} ({doing})")


def _said(written: str) -> Iterable[dict[str, Any]]:
    for line in written.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # cut off, or a library's own output
            continue
        if isinstance(said, dict):
            yield said


def _last_line(complaints: str) -> str:
    lines = complaints.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
