"""What a check on this very device found of each Pallas backend, and the verdicts that calls are decided by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from pallas_kernels.target import Target

FASTER = 1.02  # a kernel that is faster by less than the noise is not worth its risk
SHAPES = ("full", "scattered", "few", "one")


class Kind(NamedTuple):
    """What all calls of a model's programs have in common, and what backends are tried for."""

    dtype: str
    head_dim: int


class Call(NamedTuple):
    """What a verdict is about: calls of an operation with one dtype and head_dim, and shapes of one class."""

    operation: str
    dtype: str
    head_dim: int
    shapes: str


def class_of(num_rows: int, num_keys: int) -> str:
    """Returns the class of a call's shapes, from its queries (or fresh rows) and its keys.

    `"full"`: more than half as many rows as keys, as in a full prefill. `"one"`: decoding. `"few"`: up to 128 rows, a
    question alone, say. `"scattered"`: the survivors of a blend.
    """
    if num_rows == 1:
        return "one"
    if 2 * num_rows > num_keys:
        return "full"
    return "few" if num_rows <= 128 else "scattered"


@dataclass(frozen=True)
class Verdict:
    """What one backend showed for one kind of calls.

    Attributes:
        error: its largest error against float64, as a share of what rounding explains: right is at most 1.
        seconds: of the call that stands for its class; `None` where it was not timed, since results were wrong.
        xla_seconds: of XLA, in turn with it.
        problem: what is wrong with it; `None` where nothing is.
    """

    operation: str
    backend: str
    dtype: str
    head_dim: int
    shapes: str
    error: float | None = None
    seconds: float | None = None
    xla_seconds: float | None = None
    problem: str | None = None

    @property
    def call(self) -> Call:
        """The calls that it is about."""
        return Call(self.operation, self.dtype, self.head_dim, self.shapes)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as XLA."""
        return self.xla_seconds / self.seconds if self.seconds and self.xla_seconds else None

    @property
    def is_chosen(self) -> bool:
        """Whether the backend is right and faster."""
        return self.problem is None and self.speedup is not None and self.speedup >= FASTER


@dataclass(frozen=True)
class Trial:
    """A backend that was tried for one dtype and head_dim: what it serves of them, there are verdicts on.

    Attributes:
        failure: why nothing can be said of it: its check did not come to its end.
    """

    operation: str
    backend: str
    dtype: str
    head_dim: int
    failure: str | None = None

    @property
    def kind(self) -> Kind:
        """What it was tried for."""
        return Kind(self.dtype, self.head_dim)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What is known of the kernels on one device.

    Attributes:
        target: the device.
        identity: what the verdicts hold for: another driver, release of jax or source of a kernel needs others.
        trials: what they come from.
    """

    target: Target
    identity: dict[str, str]
    verdicts: tuple[Verdict, ...] = ()
    trials: tuple[Trial, ...] = ()

    def lacking(self, trials: Iterable[Trial]) -> list[Trial]:
        """Returns those of which nothing is known."""
        known = set(map(_key, self.trials))
        return [trial for trial in trials if _key(trial) not in known]

    def merged_with(self, later: Verdicts) -> Verdicts:
        """Returns these verdicts and others on the same device, which hold where both tried the same."""
        again = set(map(_key, later.trials))
        verdicts = tuple(verdict for verdict in self.verdicts if _key(verdict) not in again)
        trials = tuple(trial for trial in self.trials if _key(trial) not in again)
        return replace(self, verdicts=verdicts + later.verdicts, trials=trials + later.trials)

    def backends_for(self, call: Call) -> tuple[str, ...]:
        """Returns the backends that are right and faster than XLA for such calls, the fastest first."""
        return self._chosen.get(call, ())

    @cached_property
    def _chosen(self) -> dict[Call, tuple[str, ...]]:
        chosen: dict[Call, list[Verdict]] = {}
        for verdict in self.verdicts:
            if verdict.is_chosen:
                chosen.setdefault(verdict.call, []).append(verdict)
        return {
            call: tuple(each.backend for each in sorted(verdicts, key=lambda each: -(each.speedup or 0)))
            for call, verdicts in chosen.items()
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over what is chosen: programs compiled under equal choices are the same."""
        return hashlib.sha256(json.dumps(sorted(self._chosen.items())).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Returns it as JSON's types; `from_record` undoes that."""
        return {
            "target": asdict(self.target),
            "identity": self.identity,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "trials": [asdict(trial) for trial in self.trials],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Verdicts:
        """Returns the verdicts of a record.

        Raises:
            TypeError, KeyError, ValueError: the record is none of `record`'s.
        """
        return cls(
            Target.from_record(record["target"]),
            dict(record["identity"]),
            tuple(Verdict(**verdict) for verdict in record["verdicts"]),
            tuple(Trial(**trial) for trial in record["trials"]),
        )


def _key(of: Trial | Verdict) -> tuple[str, str, str, int]:
    return of.operation, of.backend, of.dtype, of.head_dim


_in_force: dict[Target, Verdicts] = {}


def use_verdicts(*verdicts: Verdicts) -> None:
    """From now on, calls without an implementation are decided by these, each on its device, and by no others.

    Process-wide. Programs that were traced before stay as they are: whoever keeps them must key them by
    `kernels_in_force()`.
    """
    global _in_force
    _in_force = {each.target: each for each in verdicts}


def verdicts_in_use() -> tuple[Verdicts, ...]:
    """Returns what was last given to `use_verdicts`."""
    return tuple(_in_force.values())


def verdicts_on(target: Target) -> Verdicts | None:
    """Returns the verdicts in use on a device."""
    return _in_force.get(target)


def choices_in_use() -> Hashable:
    """Returns what identifies the choices that the verdicts in use make."""
    return frozenset((target, verdicts.digest) for target, verdicts in _in_force.items())
