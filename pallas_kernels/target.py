"""The device that a traced call is compiled for, and what its caller wants of the kernels there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# By a word of its name: ahead of time there is no device to ask.
COMPUTE_CAPABILITIES = {
    "T4": (7, 5),
    **dict.fromkeys(("A100", "A800", "A30"), (8, 0)),
    **dict.fromkeys(("A10", "A10G", "A40", "A6000"), (8, 6)),
    **dict.fromkeys(("L4", "L40", "L40S"), (8, 9)),
    **dict.fromkeys(("H100", "H200", "H800", "H20", "GH200"), (9, 0)),
    **dict.fromkeys(("B200", "GB200"), (10, 0)),
}


@dataclass(frozen=True)
class Target:
    """The device that a traced call is compiled for. `platform` is `"cpu"`, `"gpu"` or `"tpu"`."""

    platform: str
    chip: str = ""
    compute_capability: tuple[int, int] | None = None  # of NVIDIA GPUs

    def __str__(self) -> str:
        return f"{self.platform} ({self.chip})" if self.chip else self.platform

    @property
    def has_float8(self) -> bool:
        """Whether programs may read float8_e4m3fn: GPUs from Ada on, TPUs from v6e on, and CPUs, in software."""
        if self.platform == "gpu":
            return (self.compute_capability or (0, 0)) >= (8, 9)
        return self.platform != "tpu" or re.search(r"v[6-9]|tpu ?[7-9]", self.chip.lower()) is not None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Target:
        """Undoes `dataclasses.asdict`, for JSON has no tuples.

        Raises:
            TypeError, KeyError, ValueError: the record is none of a target.
        """
        capability = record["compute_capability"]
        if capability is not None:
            major, minor = capability
            capability = int(major), int(minor)
        return cls(str(record["platform"]), str(record["chip"]), capability)


@runtime_checkable
class Device(Protocol):
    """What is asked of a `jax.Device`; NVIDIA GPUs also have a `compute_capability`."""

    @property
    def platform(self) -> str:
        """`"cpu"`, `"gpu"` or `"tpu"`."""

    @property
    def device_kind(self) -> str:
        """The chip's name."""


@dataclass(frozen=True)
class _Compilation:
    device: Device | None = None
    implementation: str | None = None


_compilation: ContextVar[_Compilation] = ContextVar("compilation", default=_Compilation())  # noqa: B039 (frozen)


@contextmanager
def compiling(device: Device | None, implementation: str | None) -> Iterator[None]:
    """In its body, this thread traces programs for a device, and prefers an implementation of the kernels.

    Args:
        device: `None`: JAX's default device.
        implementation: what `implementation=None` means; `None`: as the environment variable says, or else the
            verdicts in force.
    """
    token = _compilation.set(_Compilation(device, implementation))
    try:
        yield
    finally:
        _compilation.reset(token)


def preferred_while_compiling() -> str | None:
    """Returns the implementation that `compiling` prefers here; `None` outside of it."""
    return _compilation.get().implementation


def follows_its_arrays(operation: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Has an operation run by the kernels of the device that its arrays are on.

    What is traced for a program is nowhere yet: inside a jitted function, `current_target` decides.
    """

    @wraps(operation)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        arrays = [array for array in arguments if isinstance(array, jax.Array)]
        if not arrays or any(isinstance(array, jax.core.Tracer) for array in arrays):
            return operation(*arguments, **options)
        with compiling(next(iter(arrays[0].devices())), preferred_while_compiling()):
            return operation(*arguments, **options)

    return run


def current_target() -> Target:
    """Returns the device that the code being traced is meant for.

    The abstract device of the mesh in use (ahead-of-time compilation), else the device of `compiling`, else JAX's
    default device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _target(abstract.platform, abstract.device_kind, None)
    device = _compilation.get().device
    if device is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    return target_of(device)


def target_of(device: Device) -> Target:
    """Returns a device as a target."""
    return _target(device.platform, device.device_kind, getattr(device, "compute_capability", None))


def _target(platform: str | None, chip: str, capability: str | None) -> Target:
    platform = (platform or ("tpu" if "tpu" in chip.lower() else "gpu")).lower()
    if platform not in ("gpu", "cuda"):
        return Target(platform, chip)
    if capability is None:
        return Target("gpu", chip, _capability_by_name(chip))
    if "." not in capability:  # ROCm's are names
        return Target("gpu", chip)
    major, minor = capability.split(".")[:2]
    return Target("gpu", chip, (int(major), int(minor)))


def _capability_by_name(chip: str) -> tuple[int, int] | None:
    """Returns the compute capability of the GPUs of that name here, or else of those that are known by name."""
    for device in jax.local_devices():
        if device.device_kind == chip and hasattr(device, "compute_capability"):
            return target_of(device).compute_capability
    return next((known for word in re.split(r"\W+", chip) if (known := COMPUTE_CAPABILITIES.get(word))), None)
