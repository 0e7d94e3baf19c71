"""Which backend of an operation serves a call: one rule for all operations, and one wording when none can."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType

from pallas_kernels.target import Target, current_target, preferred_while_compiling
from pallas_kernels.verdicts import Call, choices_in_use, verdicts_on

__all__ = ["Target", "choose_backend", "current_target", "implementation_override", "kernels_in_force"]

BACKENDS = ("xla", "mosaic_gpu", "triton", "tpu")
IMPLEMENTATIONS = (*BACKENDS, "pallas")
# The environment variable that says what `implementation=None` means, for users whose caller does not pass one.
OVERRIDE = "PALLAS_KERNELS_IMPLEMENTATION"

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


def implementation_override() -> str | None:
    """Returns the implementation that the environment variable `PALLAS_KERNELS_IMPLEMENTATION` asks for now.

    `None` where it is unset or empty.

    Raises:
        ValueError: it names no implementation.
    """
    override = os.environ.get(OVERRIDE)
    if not override:
        return None
    if override not in IMPLEMENTATIONS:
        expected = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"the environment variable {OVERRIDE} is {override!r}; expected {expected} or 'pallas'")
    return override


def kernels_in_force() -> Hashable:
    """Returns what decides, here and now, which backends `implementation=None` means.

    The implementation that `compiling` or else the environment prefers; else what the verdicts in use choose. Traced
    programs depend on it: whoever keeps them must key them by it.
    """
    return preferred_while_compiling() or implementation_override() or choices_in_use()


def choose_backend(implementation: str | None, call: Call, unsupported: UnsupportedReasons) -> str:
    """Returns the backend that serves a call.

    Args:
        implementation: `None`: what `compiling` or else the environment prefers, where that serves the call; else the
            fastest of the Pallas backends that the verdicts in use on this device found right and faster than XLA for
            such calls; else `"xla"`. `"pallas"`: the first of the platform's Pallas backends that supports the call; on
            a CPU an interpreted one. Or a backend's name; on a CPU it is interpreted.
        unsupported: the operation's Pallas backends, and why each can't serve the call.

    Raises:
        ValueError: the implementation is unknown, or can't serve the call; the message says why.
    """
    is_required = implementation is not None
    known = ("xla", *(name for name in BACKENDS if name in unsupported))
    if not is_required:
        preferred = preferred_while_compiling() or implementation_override()
        # What is preferred is not demanded: not every operation has every backend.
        implementation = preferred if preferred in (None, *known, "pallas") else "xla"
    elif implementation not in (*known, "pallas"):
        raise ValueError(
            f"{call.operation}: unknown implementation {implementation!r}; expected None (best for the device), "
            + ", ".join(map(repr, known))
            + " or 'pallas'"
        )
    if implementation == "xla":
        return "xla"
    reasons = []
    target = current_target()
    for name in _candidates(implementation, target, call, unsupported):
        reason = wrong_platform(name, target) or unsupported[name]()
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    if not is_required:
        return "xla"
    raise ValueError(
        f"{call.operation}: implementation={implementation!r} can't serve this call: "
        + ("; ".join(reasons) or f"there is no Pallas backend for {target}")
        + "; use implementation='xla' or None"
    )


def _candidates(
    implementation: str | None, target: Target, call: Call, unsupported: UnsupportedReasons
) -> tuple[str, ...]:
    """Returns the operation's Pallas backends to try, best first."""
    if implementation is None:
        verdicts = verdicts_on(target)
        candidates = () if verdicts is None else verdicts.backends_for(call)
    else:
        candidates = pallas_backends(target) if implementation == "pallas" else (implementation,)
    return tuple(name for name in candidates if name in unsupported)


def pallas_backends(target: Target) -> tuple[str, ...]:
    """Returns the platform's Pallas backends, best first; those that a CPU interprets, for tests."""
    return {"tpu": ("tpu",), "gpu": ("mosaic_gpu", "triton"), "cpu": ("tpu", "triton")}.get(target.platform, ())


def wrong_platform(backend: str, target: Target) -> str | None:
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
