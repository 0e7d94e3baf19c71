"""Compiles equal programs of different models once in a process: most of the suite's time is compilation.

A `Runner` stays what it is: it counts what it compiles, and a program that a warm-up left out it still lacks. But what
another runner was given for the same key, on the same devices, is not traced and compiled again.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jaxtyping
import pytest

from cacheblend_jax.runtime import programs
from cacheblend_jax.runtime.programs import Runner, mapped_share
from cacheblend_jax.runtime.user_cache import PROGRAMS, is_kept

# Where that is written which programs are traced from: a test that replaces some of it gets programs of its own.
TRACED = ("cacheblend_jax.model", "cacheblend_jax.blend", "cacheblend_jax.runtime", "pallas_kernels", "jax")
# Of JAX, which tests change.
SETTINGS = ("jax_enable_x64", "jax_numpy_dtype_promotion", "jax_default_matmul_precision")
MAPPED = 0.5  # of the memory regions that this process may map: beyond it, no program is kept
COUNTED_EACH = 16  # compilations: to count regions takes tens of milliseconds

_programs: dict[Hashable, Any] = {}
_compile, _setattr = Runner._compile, pytest.MonkeyPatch.setattr
_compiled, _replaced = 0, False


def forget() -> None:
    """Keeps none of the programs compiled so far."""
    _programs.clear()


def nothing_is_replaced() -> None:
    """Begins a test: what programs are traced from is as it is written."""
    global _replaced
    _replaced = False


def setattr_noted(self, target, *args, **options):
    """`MonkeyPatch.setattr`; notes that programs may be others from now on."""
    global _replaced
    owner = target if isinstance(target, str) else getattr(target, "__module__", getattr(target, "__name__", None))
    _replaced |= owner is None or owner.startswith(TRACED)
    return _setattr(self, target, *args, **options)


def compile_once(self: Runner, entry: Any, function: partial, arrays: tuple[Any, ...], donate: tuple) -> None:
    """`Runner._compile`, of programs that the package has and no other runner had compiled."""
    global _compiled
    if _replaced or not function.func.__module__.startswith("cacheblend_jax.") or (self._keeps and is_kept(PROGRAMS)):
        return _compile(self, entry, function, arrays, donate)
    where = self._device, self._out_shardings, self._partition, self._results and self._results.args
    how = self._kernels, tuple(self._compiler_options.items()), jaxtyping.config.jaxtyping_disable
    key = entry.key, where, how, tuple(getattr(jax.config, setting) for setting in SETTINGS)
    if (known := _programs.get(key)) is not None:
        with programs._lock:
            self._count += 1
        return entry.program.set_result(known)
    _compiled += 1
    if _compiled % COUNTED_EACH == 0 and mapped_share() > MAPPED:
        forget()
    _compile(self, entry, function, arrays, donate)
    if entry.program.exception() is None:
        _programs[key] = entry.program.result()


Runner._compile, pytest.MonkeyPatch.setattr = compile_once, setattr_noted
