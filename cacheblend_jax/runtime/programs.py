"""Compiled programs, made once per static shape and counted: so that compilation is never mistaken for work."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
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
KEPT = 16  # programs used last: those of the request that wants another, in the first place
MOST_REGIONS, REGIONS = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
_cpu_caches: weakref.WeakSet[ProgramCache] = weakref.WeakSet()  # of the process, which the limit is one of
_lock = threading.Lock()  # of all caches' entries
_uses = itertools.count()


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
            regions of memory, and Linux lets a process map 65 530 of them: there, the programs of the process used
            least recently, whichever cache they are in, make room for new ones.
    """

    def __init__(self, platform: str) -> None:
        self._compiler_options = compiler_options(platform)
        self._entries: dict[Hashable, _Entry] = {}
        self._count = 0
        self._evicts = platform == "cpu"
        if self._evicts:
            with _lock:
                _cpu_caches.add(self)

    @property
    def count(self) -> int:
        """Programs compiled so far."""
        return self._count

    def texts(self) -> list[str]:
        """The compiled programs' HLO: what really runs, buffers and all."""
        return [entry.made.result().run.as_text() for entry in list(self._entries.values())]

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
        with _lock:
            entry = self._entries.get(key)
            ours = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry(key)
            entry.used = next(_uses)
        made = entry.made
        if made.done() and not ours:
            return made.result()
        began = time.perf_counter()
        if ours:
            taken = {name: static[name] for name in inspect.signature(function).parameters if name in static}
            try:
                if self._evicts:
                    _make_room()
                jitted = jax.jit(partial(function, **taken), donate_argnums=donate)
                compiled = jitted.lower(*arguments()).compile(compiler_options=self._compiler_options)
                with _lock:
                    self._count += 1
                made.set_result(Program(compiled, _peak_memory_bytes(compiled), 0.0))
            except BaseException as error:
                with _lock:
                    self._entries.pop(key, None)  # the next caller tries again
                made.set_exception(error)
        return made.result()._replace(compile_s=time.perf_counter() - began)


@dataclass(eq=False)
class _Entry:
    key: Hashable
    made: Future[Program] = field(default_factory=Future)
    used: int = 0  # when last, by `_uses`


def _make_room() -> None:
    """Drops the process's programs used least recently while it has mapped nearly all the regions that it may."""
    while mapped_share() > MAPPED_SHARE:
        dropped = _drop_oldest()
        if not dropped:
            return
        _tell_of_drops()
        logger.debug("dropped %d compiled programs", dropped)


def _drop_oldest() -> int:
    """Drops some programs; returns how many. They are freed when it returns."""
    with _lock:
        made = [(entry, where._entries) for where in _cpu_caches for entry in where._entries.values()]
        made = [(entry, entries) for entry, entries in made if entry.made.done()]
        oldest = sorted(made, key=lambda each: each[0].used)[:-KEPT][:EVICTED_AT_ONCE]
        for entry, entries in oldest:
            del entries[entry.key]
    return len(oldest)


@cache
def _tell_of_drops() -> None:
    logger.warning(
        "from now on, compiled programs used least recently are dropped: this process has mapped nearly as many "
        "regions of memory as it may; raise vm.max_map_count, or use fewer programs (length_buckets)"
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


def mapped_share() -> float:
    """Returns the regions of memory that this process has mapped as a share of what it may; 0 where none is known."""
    try:
        most = int(MOST_REGIONS.read_text())
        with REGIONS.open("rb") as mapped:
            return sum(1 for _ in mapped) / most
    except (OSError, ValueError):
        return 0.0


def _peak_memory_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes
