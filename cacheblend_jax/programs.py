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
    """A compiled program.

    Attributes:
        run: calls it.
        peak_memory_bytes: device memory that a run takes by the compiler's account: arguments, results, temporaries.
        compile_s: seconds that this caller waited for the compilation; 0 where the program was ready.
    """

    run: Any
    peak_memory_bytes: int
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

    def texts(self) -> list[str]:
        """The compiled programs' HLO: what really runs, buffers and all."""
        return [made.result().run.as_text() for made in list(self._programs.values())]

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
            return made.result()
        began = time.perf_counter()
        if ours:
            taken = {name: static[name] for name in inspect.signature(function).parameters if name in static}
            try:
                jitted = jax.jit(partial(function, **taken), donate_argnums=donate)
                compiled = jitted.lower(*arguments()).compile(compiler_options=self._compiler_options)
                made.set_result(Program(compiled, _peak_memory_bytes(compiled), 0.0))
            except BaseException as error:
                with self._lock:
                    del self._programs[key]  # the next caller tries again
                made.set_exception(error)
        return made.result()._replace(compile_s=time.perf_counter() - began)


def _peak_memory_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes
