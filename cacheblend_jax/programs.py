"""Compiled programs, made once per static shape and counted: so that compilation is never mistaken for work."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program, and the seconds that this caller waited for its compilation: 0 where it was ready."""

    run: Callable[..., Any]
    compile_s: float


class ProgramCache:
    """Programs compiled ahead of time, by name and static arguments. Safe to use from several threads.

    Different programs compile at the same time; a program that two threads want is compiled once.

    Args:
        platform: `"cpu"`, `"gpu"` or `"tpu"`, which the programs run on.
    """

    def __init__(self, platform: str) -> None:
        # On CPUs with AVX-512 XLA prefers 256-bit vectors; 512 bits make attention 7 % faster.
        self._compiler_options: dict[str, str | bool] = (
            {"xla_cpu_prefer_vector_width": "512"} if platform == "cpu" else {}
        )
        self._programs: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

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
    ) -> Program:
        """Returns `function` compiled for these static keyword arguments; compiles it the first time.

        A static argument that `function` does not take (`rows=` of a shape, say) only tells programs apart.
        `arguments()` gives the shapes, dtypes and shardings of the traced arguments; they must follow from `static`.
        """
        key = (function, donate, tuple(sorted(static.items())))
        with self._lock:
            made = self._programs.get(key)
            ours = made is None
            if made is None:
                made = self._programs[key] = Future()
        if made.done() and not ours:
            return Program(made.result(), 0.0)
        began = time.perf_counter()
        if ours:
            taken = {name: static[name] for name in inspect.signature(function).parameters if name in static}
            try:
                jitted = jax.jit(partial(function, **taken), donate_argnums=donate)
                made.set_result(jitted.lower(*arguments()).compile(compiler_options=self._compiler_options))
            except BaseException as error:
                with self._lock:
                    del self._programs[key]  # the next caller tries again
                made.set_exception(error)
        return Program(made.result(), time.perf_counter() - began)
