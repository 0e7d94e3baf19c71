"""What this machine has, and what was found of the kernels on it: the work of the command `doctor`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax

from cacheblend_jax.errors import CacheBlendError
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import Outcome, UnprovenError, backends_to_try, describe_first_device, prove
from pallas_kernels.proving.remembered import recall, remember
from pallas_kernels.proving.report import outcome_lines, report_lines
from pallas_kernels.verdicts import Verdicts

PACKAGES = ("cacheblend-jax", "jax", "jaxlib")


@dataclass(frozen=True)
class DeviceReport:
    """A device, and what is remembered of its kernels: `None` where that is nothing.

    Attributes:
        has_kernels: whether any Pallas kernel can run on it.
    """

    place: Place
    has_kernels: bool
    verdicts: Verdicts | None

    def record(self) -> dict[str, Any]:
        """Returns it as JSON's types."""
        kernels = None
        if self.verdicts is not None:
            kernels = self.verdicts.record()
            for record, verdict in zip(kernels["verdicts"], self.verdicts.verdicts, strict=True):
                record |= {"speedup": verdict.speedup, "used": verdict.is_chosen}
        return asdict(self.place) | {"kernels": kernels}

    @property
    def lines(self) -> list[str]:
        """The report as text."""
        identity = self.place.identity
        named = {"compute capability": "compute_capability", "driver": "driver"}
        details = [f"{name} {identity[key]}" for name, key in named.items() if identity[key]]
        return [", ".join([str(self.place.target), *details]), *(f"  {line}" for line in self._kernel_lines)]

    @property
    def _kernel_lines(self) -> list[str]:
        if self.verdicts is not None:
            return report_lines(self.verdicts) or ["kernels: XLA's; no other serves what was tried"]
        if self.has_kernels:
            return [
                "kernels: not proven yet; the first engine does it for its model, cacheblend-jax doctor --prove for all"
            ]
        return ["kernels: XLA's; no other can run here"]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    versions: dict[str, str]
    devices: list[DeviceReport]

    def record(self) -> dict[str, Any]:
        """Returns it as JSON's types."""
        return {"versions": self.versions, "devices": [device.record() for device in self.devices]}


def diagnose(*, prove_again: bool = False, say: Callable[[str], None] = lambda line: None) -> Diagnosis:
    """Returns the versions, the devices, and what is remembered of the kernels on each.

    Args:
        prove_again: first prove all kernels of the first device, whatever is remembered, and remember the verdicts.
        say: called with a line for each thing found on the way.

    Raises:
        CacheBlendError: the kernels can't be proven now, or the verdicts can't be remembered.
    """
    if prove_again:
        _prove_first_device(say)
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    places = {place.target: place for place in map(Place.of, jax.local_devices())}  # one of each kind
    return Diagnosis(versions, [_report(place) for place in places.values()])


def _report(place: Place) -> DeviceReport:
    has_kernels = place.target.platform != "cpu" and bool(backends_to_try(place.target))
    return DeviceReport(place, has_kernels, recall(place.identity) if has_kernels else None)


def _prove_first_device(say: Callable[[str], None]) -> None:
    def tell(operation: str, backend: str, outcome: Outcome) -> None:
        for line in outcome_lines(operation, backend, outcome.verdicts, outcome.reason):
            say(line)

    try:
        place = describe_first_device()
        if not _report(place).has_kernels:
            raise CacheBlendError(f"--prove needs a device with Pallas kernels, and this is {place.target}")
        remember(prove(place, progress=tell))
    except UnprovenError as error:
        raise CacheBlendError(f"the kernels can't be proven now: {error}; end what else uses the device") from error
    except OSError as error:
        raise CacheBlendError(f"the verdicts can't be remembered: {error}; set XDG_CACHE_HOME") from error
