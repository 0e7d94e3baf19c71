"""Proves the Pallas backends on a device: each is tried in a process of its own, which may crash or hang."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pallas_kernels.attention.api import BACKENDS as ATTENTION_BACKENDS
from pallas_kernels.blending.api import BACKENDS as BLENDING_BACKENDS
from pallas_kernels.dispatch import OVERRIDE, pallas_backends, wrong_platform
from pallas_kernels.proving.case import KINDS
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.processes import ended
from pallas_kernels.target import Target
from pallas_kernels.verdicts import Kind, Trial, Verdict, Verdicts

LIMIT_SECONDS, DESCRIBING_SECONDS = 300.0, 120.0
BACKENDS = {"selective_attention": ATTENTION_BACKENDS, "blend_kv": BLENDING_BACKENDS}
NO_MEMORY = "Out of memory while trying to allocate"
# -P: a package of the same name in the current directory is none of ours.
CHILD = (sys.executable, "-P", "-m", "pallas_kernels.proving.child")
Command = Callable[[str, str, Target, Sequence[Kind]], Sequence[str]]


class UnprovenError(RuntimeError):
    """Nothing can be said of the kernels for now: no free memory on the device, say. Not to be remembered."""


@dataclass(frozen=True)
class Outcome:
    """What the trial of a backend came to.

    Attributes:
        is_ready: it had the device, and the memory that it needs.
        reason: why there are no verdicts; `None` if there are.
    """

    is_ready: bool
    verdicts: tuple[Verdict, ...] = ()
    reason: str | None = None


Progress = Callable[[str, str, Outcome], None]


def child_command(operation: str, backend: str, target: Target, kinds: Sequence[Kind]) -> Sequence[str]:
    """Returns the command that tries a backend; see `child.py`."""
    return [*CHILD, operation, backend, target.platform, target.chip, *(str(part) for kind in kinds for part in kind)]


def backends_to_try(target: Target) -> list[tuple[str, str]]:
    """Returns each operation's backends that can run on a device."""
    able = [name for name in pallas_backends(target) if wrong_platform(name, target) is None]
    return [(operation, name) for operation, backends in BACKENDS.items() for name in able if name in backends]


def trials_on(target: Target, kinds: Sequence[Kind] = KINDS) -> list[Trial]:
    """Returns the trials of all backends that can run on a device."""
    return [Trial(operation, backend, *kind) for operation, backend in backends_to_try(target) for kind in kinds]


def describe_first_device(command: Sequence[str] = CHILD) -> Place:
    """Returns JAX's first device, without opening it in this process: a TPU serves one process at a time.

    Raises:
        UnprovenError: there is none that can be opened.
    """
    end = ended(command, _environment(), DESCRIBING_SECONDS)
    for said in end.said:
        if "place" in said:
            place = said["place"]
            return Place(Target.from_record(place["target"]), place["identity"], place["visible_gpu"])
    raise UnprovenError(f"the process that looks for a device {end.how}")


def prove(
    place: Place,
    trials: Sequence[Trial] | None = None,
    *,
    limit_seconds: float = LIMIT_SECONDS,
    command: Command = child_command,
    progress: Progress | None = None,
) -> Verdicts:
    """Tries Pallas backends on a device, each in a process of its own, one after another.

    Args:
        trials: `None`: all of `trials_on`.
        limit_seconds: of each process; one that takes longer is killed.
        command: starts such a process.
        progress: called after each.

    Raises:
        UnprovenError: the device has no memory to spare, or can't be opened by another process.
    """
    verdicts: list[Verdict] = []
    ended_trials: list[Trial] = []
    for (operation, backend), of_backend in _by_backend(trials_on(place.target) if trials is None else trials).items():
        process = command(operation, backend, place.target, [trial.kind for trial in of_backend])
        outcome = _try(process, _environment(place.visible_gpu), limit_seconds)
        if progress is not None:
            progress(operation, backend, outcome)
        _check_that_it_says_something(outcome)
        verdicts += outcome.verdicts
        ended_trials += [replace(trial, failure=outcome.reason) for trial in of_backend]
    return Verdicts(place.target, place.identity, tuple(verdicts), tuple(ended_trials))


def _by_backend(trials: Iterable[Trial]) -> dict[tuple[str, str], list[Trial]]:
    by_backend: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        by_backend.setdefault((trial.operation, trial.backend), []).append(trial)
    return by_backend


def _try(command: Sequence[str], environment: dict[str, str], limit_seconds: float) -> Outcome:
    end = ended(command, environment, limit_seconds)
    is_ready, doing = False, "starting"
    for said in end.said:
        is_ready |= bool(said.get("ready"))
        doing = said.get("doing", doing)
        if "verdicts" in said:
            return Outcome(True, tuple(Verdict(**verdict) for verdict in said["verdicts"]))
    return Outcome(is_ready, reason=f"{end.how} ({doing})")


def _check_that_it_says_something(outcome: Outcome) -> None:
    problems = [outcome.reason, *(verdict.problem for verdict in outcome.verdicts)]
    lacking = next((problem for problem in problems if problem and NO_MEMORY in problem), None)
    if lacking or not outcome.is_ready:
        raise UnprovenError(lacking or f"the process that was to try a kernel {outcome.reason}")


def _environment(visible_gpu: str = "") -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != OVERRIDE}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    # Beside a process that has taken three quarters of the memory, as JAX does.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}
    if visible_gpu:  # a context on each GPU would take memory from all
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpu
    return environment
