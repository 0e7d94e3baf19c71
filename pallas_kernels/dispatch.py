"""Which backend of an operation serves a call: one rule for all operations, and one wording when none can."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import jax

BACKENDS = ("xla", "mosaic_gpu", "triton", "tpu")
# The environment variable that says what `implementation=None` means, for users whose caller does not pass one.
OVERRIDE = "PALLAS_KERNELS_IMPLEMENTATION"
# Backends that scripts/gpu_bench.py has checked on a device: only these are chosen by default.
PROVEN: frozenset[str] = frozenset()
HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@dataclass(frozen=True)
class Target:
    """The device that a traced call is compiled for. `platform` is `"cpu"`, `"gpu"` or `"tpu"`."""

    platform: str
    chip: str = ""
    compute_capability: tuple[int, int] | None = None  # of NVIDIA GPUs

    def __str__(self) -> str:
        return f"{self.platform} ({self.chip})" if self.chip else self.platform


UnsupportedReasons = Mapping[str, Callable[[], str | None]]
"""By backend, in any order: why it can't serve this call's shapes and dtypes; `None` where it can."""


def unsupported_reasons(
    backends: Mapping[str, tuple[str, str]],
    reason_of: Callable[[str, ModuleType], str | None],
    shared_reason: str | None,
) -> UnsupportedReasons:
    """Returns why backends can't serve a call: `shared_reason` if given, a failing import, or what `reason_of` says.

    Args:
        backends: each backend's module, imported only when its reason is asked for, and function.
        reason_of: the reason of one backend, given its name and module.
        shared_reason: a reason that holds for all backends.
    """

    def reason(backend: str) -> str | None:
        if shared_reason is not None:
            return shared_reason
        try:
            module = import_module(backends[backend][0])
        except ImportError as error:  # JAX releases drop and rename backends
            return f"can't be imported ({error})"
        return reason_of(backend, module)

    return {backend: partial(reason, backend) for backend in backends}


def current_target() -> Target:
    """Returns the device that the code being traced is meant for.

    The abstract device of the mesh in use (ahead-of-time compilation), else JAX's default device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _target(abstract.platform, abstract.device_kind, None)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    return _target(device.platform, device.device_kind, getattr(device, "compute_capability", None))


def _target(platform: str | None, chip: str, capability: str | None) -> Target:
    platform = (platform or ("tpu" if "tpu" in chip.lower() else "gpu")).lower()
    if platform not in ("gpu", "cuda"):
        return Target(platform, chip)
    if capability is None and any(name in chip for name in HOPPER):
        capability = "9.0"
    if capability is None or "." not in capability:  # ROCm's are names
        return Target("gpu", chip)
    major, minor = capability.split(".")[:2]
    return Target("gpu", chip, (int(major), int(minor)))


def implementation_override() -> str | None:
    """Returns the implementation that the environment variable `PALLAS_KERNELS_IMPLEMENTATION` asks for now.

    `None` where it is unset or empty. Traced programs depend on it: whoever keeps them must key them by it.

    Raises:
        ValueError: it names no implementation.
    """
    override = os.environ.get(OVERRIDE)
    if not override:
        return None
    if override not in (*BACKENDS, "pallas"):
        expected = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"the environment variable {OVERRIDE} is {override!r}; expected {expected} or 'pallas'")
    return override


def choose_backend(
    implementation: str | None, operation: str, unsupported: UnsupportedReasons, default: str | None = None
) -> str:
    """Returns the backend that serves this call of `operation`.

    Args:
        implementation: `None`: `default`, or where that is `None` the first of the platform's Pallas backends that is
            `PROVEN` and supports the call, or else `"xla"`. `"pallas"`: the first of the platform's Pallas backends
            that supports the call; on a CPU an interpreted one. Or a backend's name; on a CPU it is interpreted.
        operation: its name, for messages.
        unsupported: the operation's Pallas backends, and why each can't serve the call.
        default: what `None` means for this operation, where the environment asks for nothing that it has.

    Raises:
        ValueError: the implementation is unknown, or can't serve the call; the message says why.
    """
    is_required = implementation is not None
    known = ("xla", *(name for name in BACKENDS if name in unsupported))
    if not is_required:
        override = implementation_override()
        implementation = override if override in (*known, "pallas") else default
    if implementation is not None and implementation not in (*known, "pallas"):
        raise ValueError(
            f"{operation}: unknown implementation {implementation!r}; expected None (best for the platform), "
            + ", ".join(map(repr, known))
            + " or 'pallas'"
        )
    if implementation == "xla":
        return "xla"
    reasons = []
    target = current_target()
    for name in _candidates(implementation, target, unsupported):
        reason = _wrong_platform(name, target) or unsupported[name]()
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    if not is_required:  # an environment override is only a preference: not every operation has every backend
        return "xla"
    raise ValueError(
        f"{operation}: implementation={implementation!r} can't serve this call: "
        + ("; ".join(reasons) or f"there is no Pallas backend for {target}")
        + "; use implementation='xla' or None"
    )


def _candidates(implementation: str | None, target: Target, unsupported: UnsupportedReasons) -> tuple[str, ...]:
    """Returns the operation's Pallas backends to try, best first."""
    if implementation is not None and implementation in unsupported:
        return (implementation,)
    candidates = tuple(name for name in _pallas_backends(target, implementation) if name in unsupported)
    return candidates if implementation == "pallas" else tuple(name for name in candidates if name in PROVEN)


def _pallas_backends(target: Target, implementation: str | None) -> tuple[str, ...]:
    """Returns the platform's Pallas backends, best first. By default nothing is interpreted: that is for tests."""
    if target.platform == "tpu":
        return ("tpu",)
    if target.platform == "gpu":
        return ("mosaic_gpu", "triton")
    if target.platform == "cpu" and implementation == "pallas":
        return ("tpu", "triton")
    return ()


def _wrong_platform(backend: str, target: Target) -> str | None:
    """Returns why the backend can't run on the device at all; `None` where it can. A CPU interprets each."""
    if target.platform == "cpu":
        return None
    if (backend == "tpu") != (target.platform == "tpu"):
        return f"needs a {'TPU' if backend == 'tpu' else 'GPU'}, this is {target}"
    # wgmma is Hopper's alone: neither Ampere nor Blackwell has it.
    if backend == "mosaic_gpu" and (target.compute_capability or (0, 0))[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.0), this is {target}"
    # On Turing XLA refuses to compile Triton.
    if backend == "triton" and (target.compute_capability or (0, 0)) < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, this is {target}"
    return None
