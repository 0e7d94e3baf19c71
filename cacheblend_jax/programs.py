"""Compiled programs, made once per static shape and counted: so that compilation is never mistaken for work."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    # On CPUs with AVX-512 XLA prefers 256-bit vectors; 512 bits make attention 7 % faster.
    "cpu": {"xla_cpu_prefer_vector_width": "512"},
    # XLA would join the products with the weights of queries, keys and values, and copy the weights to do so.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
}
MAPPED_SHARE = 0.75  # of the memory regions that the kernel lets a process map
EVICTED_AT_ONCE = 8


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
        platform: `"cpu"`, `"gpu"` or `"tpu"`, which the programs run on. A program for a CPU maps up to a thousand
            regions of memory, and Linux lets a process map 65 530 of them: there, the programs used least recently
            make room for new ones.
    """

    def __init__(self, platform: str) -> None:
        self._most_regions = _most_regions() if platform == "cpu" else None
        self._compiler_options = compiler_options(platform)
        self._programs: OrderedDict[Hashable, Future] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Programs compiled so far."""
        return self._count

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
            self._programs.move_to_end(key)
        if made.done() and not ours:
            return made.result()
        began = time.perf_counter()
        if ours:
            taken = {name: static[name] for name in inspect.signature(function).parameters if name in static}
            try:
                self._make_room()
                jitted = jax.jit(partial(function, **taken), donate_argnums=donate)
                compiled = jitted.lower(*arguments()).compile(compiler_options=self._compiler_options)
                with self._lock:
                    self._count += 1
                made.set_result(Program(compiled, _peak_memory_bytes(compiled), 0.0))
            except BaseException as error:
                with self._lock:
                    self._programs.pop(key, None)  # the next caller tries again
                made.set_exception(error)
        return made.result()._replace(compile_s=time.perf_counter() - began)

    def _make_room(self) -> None:
        """Drops the programs used least recently while the process has mapped nearly all that it may."""
        while self._most_regions is not None and _mapped_regions() > MAPPED_SHARE * self._most_regions:
            with self._lock:
                done = [key for key, made in self._programs.items() if made.done()][:EVICTED_AT_ONCE]
                for key in done:
                    del self._programs[key]
            if not done:
                return
            logger.warning(
                "dropped %d compiled programs: the process may map only %d regions of memory; raise vm.max_map_count, "
                "or use fewer programs (length_buckets)",
                len(done),
                self._most_regions,
            )


@cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Returns the platform's compiler options; none where XLA no longer knows them: they only make programs faster."""
    options = COMPILER_OPTIONS.get(platform)
    if options is None:
        return {}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        logger.warning("programs are compiled without %s: %s", ", ".join(options), error)
        return {}
    return options


def _most_regions() -> int | None:
    """Memory regions that a process may map; `None` where there is no such limit."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return None


def _mapped_regions() -> int:
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def _peak_memory_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes
