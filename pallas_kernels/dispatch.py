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
OVERRIDE = "PALLAS_KERNELS_IMPLEMENTATION"  # what `implementation=None` means, for users whose caller does not ask
# Backends that scripts/gpu_bench.py has checked on a device: only these are chosen unasked.
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


Declines = Mapping[str, Callable[[], str | None]]
"""By backend, in any order: why it can't serve this call's shapes and dtypes; `None` where it can."""


def declines_of(
    backends: Mapping[str, tuple[str, str]], declined: Callable[[str, ModuleType], str | None], of_all: str | None
) -> Declines:
    """Returns why backends can't serve a call: `of_all` if given, a failing import, or what `declined` says.

    Args:
        backends: each one's module, imported when asked about, and function.
    """

    def reason(backend: str) -> str | None:
        if of_all is not None:
            return of_all
        try:
            module = import_module(backends[backend][0])
        except ImportError as error:  # what a release of JAX dropped or renamed
            return f"can't be imported ({error})"
        return declined(backend, module)

    return {backend: partial(reason, backend) for backend in backends}


def current_target() -> Target:
    """Returns the device that what is traced now is meant for.

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


def choose_backend(implementation: str | None, operation: str, declines: Declines, default: str | None = None) -> str:
    """Returns the backend that serves this call of `operation`.

    Args:
        implementation: `None`: `default`, or where that is `None` the first of the platform's Pallas backends that is
            `PROVEN` and does not decline, or else `"xla"`. `"pallas"`: the first of all that do not decline; on a CPU
            an interpreted one. Or a backend's name; on a CPU it is interpreted.
        declines: the operation's Pallas backends, and why each can't serve the call.

    Raises:
        ValueError: the implementation is unknown, or can't serve the call; the message says why.
    """
    asked = implementation is not None
    known = tuple(name for name in BACKENDS if name == "xla" or name in declines)
    if not asked:
        implementation = _wish(known) or default
    if implementation is not None and implementation not in (*known, "pallas"):
        raise ValueError(
            f"{operation}: unknown implementation {implementation!r}; expected None (best for the platform), "
            + ", ".join(map(repr, known))
            + " or 'pallas'"
        )
    if implementation == "xla":
        return "xla"
    target = current_target()
    candidates: tuple[str, ...]
    if implementation is not None and implementation in declines:
        candidates = (implementation,)
    else:
        candidates = tuple(name for name in _pallas_backends(target, implementation) if name in declines)
    if implementation is None:
        candidates = tuple(name for name in candidates if name in PROVEN)
    reasons = []
    for name in candidates:
        reason = _wrong_platform(name, target) or declines[name]()
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    if not asked:  # the environment's wish is no demand: not every operation has every backend
        return "xla"
    raise ValueError(
        f"{operation}: implementation={implementation!r} can't serve this call: "
        + ("; ".join(reasons) or f"there is no Pallas backend for {target}")
        + "; use implementation='xla' or None"
    )


def _wish(known: tuple[str, ...]) -> str | None:
    """What the environment asks for, as far as the operation has it."""
    wish = os.environ.get(OVERRIDE)
    if wish and wish not in (*BACKENDS, "pallas"):
        expected = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"the environment variable {OVERRIDE} is {wish!r}; expected {expected} or 'pallas'")
    return wish if wish in (*known, "pallas") else None


def _pallas_backends(target: Target, implementation: str | None) -> tuple[str, ...]:
    """The platform's Pallas backends, best first. By default nothing is interpreted: it is for tests."""
    if target.platform == "tpu":
        return ("tpu",)
    if target.platform == "gpu":
        return ("mosaic_gpu", "triton")
    if target.platform == "cpu" and implementation == "pallas":
        return ("tpu", "triton")
    return ()


def _wrong_platform(backend: str, target: Target) -> str | None:
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
