"""Compiled programs, made once per static shape and counted: so that compilation is never mistaken for work."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax


class ProgramCache:
    """Programs compiled ahead of time, by name and static arguments. Safe to use from several threads."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Any] = {}
        self._lock = threading.RLock()
        self.compile_s = 0.0

    @property
    def count(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def get(
        self,
        function: Callable[..., Any],
        arguments: Callable[[], tuple[Any, ...]],
        *,
        donate: tuple[int, ...] = (),
        **static: Hashable,
    ) -> Any:
        """Returns `function` compiled for these static keyword arguments; compiles it the first time.

        A static argument that `function` does not take (`rows=` of a shape, say) only tells programs apart.
        `arguments()` gives the shapes, dtypes and shardings of the traced arguments; they must follow from `static`.
        """
        key = (function, donate, tuple(sorted(static.items())))
        with self._lock:
            if key not in self._programs:
                began = time.perf_counter()
                taken = {name: static[name] for name in inspect.signature(function).parameters if name in static}
                jitted = jax.jit(partial(function, **taken), donate_argnums=donate)
                self._programs[key] = jitted.lower(*arguments()).compile()
                self.compile_s += time.perf_counter() - began
            return self._programs[key]
