"""Functions compiled for the shapes they meet; programs are counted, and dropped where no more can be mapped."""

from __future__ import annotations

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
from typing import Any

import jax
import numpy as np

from cacheblend_jax.runtime.exit_hook import to_its_end
from cacheblend_jax.runtime.user_cache import PROGRAMS, is_kept
from pallas_kernels.dispatch import kernels_in_force
from pallas_kernels.partition import Partition, splitting
from pallas_kernels.target import compiling

logger = logging.getLogger(__name__)
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    # On CPUs with AVX-512 XLA prefers 256-bit vectors; 512 bits make attention 7 % faster.
    "cpu": {"xla_cpu_prefer_vector_width": "512"},
    # XLA would merge the products with the weights of queries, keys and values, and copy the weights to do so.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
}
MAX_MAPPED_SHARE = 0.75  # of the memory regions that the kernel lets a process map
SHARE_OF_A_PROGRAM = 0.02  # of those regions, where Linux allows the usual 65,530: more than a program takes
EVICTED_AT_ONCE = 8
MIN_KEPT = 16  # the programs used last stay: a request that compiles one more needs its others, too
REMEMBERED_ARRAYS = 4096  # more than a model's weights, where each layer's are apart
MAX_REGIONS_FILE, REGIONS_FILE = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")

_lock = threading.Lock()  # guards the programs of all runners
_cpu_runners: weakref.WeakSet[Runner] = weakref.WeakSet()  # the limit of mapped regions holds for the whole process
_uses = itertools.count()
_drops = 0  # how often programs were dropped in this process
_programs_with_room = 0  # how many more find regions to map, surely
# By `id`: reading a shape from an array takes a microsecond, and a model with each layer's weights apart has hundreds.
_array_shapes: dict[int, tuple[weakref.ref, Hashable]] = {}


@dataclass(frozen=True)
class Prepared:
    """The cost of having a loop's programs ready.

    Attributes:
        compile_s: seconds that this caller waited for compilation; 0 if all were ready.
        peak_memory_bytes: the most device memory that any of the programs takes, as the compiler counts it: arguments,
            results and temporaries.
    """

    compile_s: float
    peak_memory_bytes: int


class Runner:
    """Runs functions of arrays as programs compiled for the shapes that they meet.

    `runner(function, *arrays, donate=…, **static)` is `function(*arrays, **static)`, compiled the first time that the
    function meets this combination of structure, shapes, dtypes, placements and static arguments. Given a
    `jax.ShapeDtypeStruct` among the arrays, it compiles and returns the shapes of the results: a loop over programs,
    run over shapes, compiles all of them and computes nothing. A `numpy` array stands for one on the host.

    Safe to use from several threads. Different programs compile at the same time; a program that two threads want is
    compiled once.

    Args:
        placement: where results go on a mesh, and arrays that come from the host. On a single device they stay where
            they are.
        platform: `"cpu"`, `"gpu"` or `"tpu"`, which the programs run on. A program for a CPU maps up to a thousand
            regions of memory, and Linux lets a process map 65,530 of them. So, on a CPU, the least recently used
            programs of the process, from any of its runners, are dropped to make room for new ones.
        kernels: the implementation that the kernels in its programs are to have where they can; `None`: what the
            environment prefers, or else what was proven on the device.
        partition: how programs split their arrays over the mesh.
        results: returns where results go that do not all go to `placement`, given their shapes.
    """

    def __init__(
        self,
        platform: str,
        placement: jax.sharding.Sharding | None = None,
        *,
        kernels: str | None = None,
        partition: Partition | None = None,
        results: Callable[[Any], Any] | None = None,
    ) -> None:
        self._compiler_options = compiler_options(platform)
        self._device = None if placement is None else next(iter(placement.device_set))
        self._kernels, self._partition, self._results = kernels, partition, results
        self._out_shardings = placement if isinstance(placement, jax.sharding.NamedSharding) else None
        self._entries: dict[Hashable, _Entry] = {}
        self._prepared: dict[Hashable, tuple[Prepared, int]] = {}
        self._yielding: list[weakref.WeakMethod[Callable[[], bool]]] = []
        self._count = 0
        self._keeps = platform == "cpu" and self._out_shardings is partition is results is None
        self._evicts = platform == "cpu"
        if self._evicts:
            with _lock:
                _cpu_runners.add(self)

    def __call__(
        self, function: Callable[..., Any], *arrays: Any, donate: tuple[str, ...] = (), **static: Hashable
    ) -> Any:
        """Runs `function`, or compiles it where it is given shapes.

        Args:
            arrays: pytrees of arrays, `numpy` arrays and shapes.
            donate: names of the parameters whose buffers the program may overwrite.
            static: keyword arguments that programs are compiled for.
        """
        program, _, over_shapes = self._program(function, arrays, donate, static)
        if over_shapes:
            return program.result_shapes
        try:
            return program.run(*arrays)
        except jax.errors.JaxRuntimeError as error:
            # What was donated may be gone: such a program cannot run again.
            if donate or not is_exhausted(error) or not self._others_yield():
                raise
        return program.run(*arrays)

    def add_yielding(self, give_way: Callable[[], bool]) -> None:
        """Has a program that lacks memory on the device run once more, if a method frees some that can be spared.

        Args:
            give_way: a bound method, known as long as its object lives; returns whether it freed any.
        """
        alive = [known for known in self._yielding if known() is not None]
        self._yielding = [*alive, weakref.WeakMethod(give_way)]

    def _others_yield(self) -> bool:
        freed = [give_way() for known in self._yielding if (give_way := known()) is not None]
        return any(freed)

    @property
    def count(self) -> int:
        """Programs compiled so far."""
        return self._count

    def texts(self) -> list[str]:
        """Returns the optimised HLO of the compiled programs: what runs, with its buffers."""
        return [entry.program.result().run.as_text() for entry in list(self._entries.values())]

    def prepare(self, name: Hashable, loop: Callable[[Callable[..., Any]], object]) -> Prepared:
        """Compiles the programs of a loop that are not ready.

        Args:
            name: identifies this loop and its shapes. A loop that was prepared is not run again, unless programs were
                dropped since.
            loop: runs over shapes; called with a stand-in for this runner.
        """
        key = name, self._kernels_in_force()
        known, drops = self._prepared.get(key, (None, -1))
        if known is not None and drops == _drops:
            return known
        drops, recorder = _drops, _Recorder(self)
        loop(recorder)
        prepared = Prepared(recorder.compile_s, recorder.peak_memory_bytes)
        self._prepared[key] = Prepared(0.0, recorder.peak_memory_bytes), drops
        return prepared

    def is_prepared(self, name: Hashable) -> bool:
        """Returns whether a loop of this name was prepared, and no program was dropped since."""
        return self._prepared.get((name, self._kernels_in_force()), (None, -1))[1] == _drops

    def _kernels_in_force(self) -> Hashable:
        return self._kernels or kernels_in_force()

    def _program(
        self,
        function: Callable[..., Any],
        arrays: tuple[Any, ...],
        donate: tuple[str, ...],
        static: dict[str, Hashable],
    ) -> tuple[_Program, float, bool]:
        """Returns the program, the seconds that this caller waited for its compilation, and whether it gave shapes."""
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple(map(_shape_of, leaves))
        over_shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        # A kernel is chosen while a function is traced, so what it is chosen by is part of the key.
        key = (function, donate, tuple(sorted(static.items())), structure, shapes, self._kernels_in_force())
        while True:
            with _lock:
                entry = self._entries.get(key)
                ours = entry is None
                if entry is None:
                    entry = self._entries[key] = _Entry(key)
                entry.used = next(_uses)
            try:
                if entry.program.done() and not ours:
                    return entry.program.result(), 0.0, over_shapes
                began = time.perf_counter()
                if ours:
                    self._compile(entry, partial(function, **static), arrays, donate)
                return entry.program.result(), time.perf_counter() - began, over_shapes
            except _AbandonedError:  # another thread was to compile it
                continue

    def _compile(self, entry: _Entry, function: partial, arrays: tuple[Any, ...], donate: tuple) -> None:
        try:
            if self._evicts:
                _make_room()
            with compiling(self._device, self._kernels), splitting(self._partition):
                lowered = self._lowered(entry.key, function, arrays, donate)
            compiled = to_its_end(partial(lowered.compile, compiler_options=self._compiler_options))
            with _lock:
                self._count += 1
            result_shapes = jax.tree.map(_without_layout, compiled.out_info)
            entry.program.set_result(_Program(compiled, result_shapes, _peak_memory_bytes(compiled)))
        except BaseException as error:
            with _lock:
                self._entries.pop(entry.key, None)  # the next caller tries again
            if not isinstance(error, Exception):  # this thread is interrupted, not those that wait for it
                entry.program.set_exception(_AbandonedError())
                raise
            entry.program.set_exception(error)

    def _lowered(self, key: Hashable, function: partial, arrays: tuple[Any, ...], donate: tuple[str, ...]) -> Any:
        if self._keeps and is_kept(PROGRAMS):
            # Where nothing is kept (an image for GPUs), what it imports may be missing.
            from cacheblend_jax.runtime.kept_programs import kept_or_lowered

            if (kept := kept_or_lowered(key, function, arrays, donate)) is not None:
                return kept
        if self._results is None:
            return jax.jit(function, donate_argnames=donate, out_shardings=self._out_shardings).lower(*arrays)
        # Left to itself, the compiler may split arrays of the host over the mesh.
        arrays = jax.tree.map(lambda leaf: _shape_at(leaf, self._out_shardings), arrays)
        shardings = self._results(jax.eval_shape(function, *arrays))
        return jax.jit(function, donate_argnames=donate, out_shardings=shardings).lower(*arrays)


class _Recorder:
    """Stands in for a runner while a loop runs over shapes; records compile time and peak memory."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.compile_s, self.peak_memory_bytes = 0.0, 0

    def __call__(
        self, function: Callable[..., Any], *arrays: Any, donate: tuple[str, ...] = (), **static: Hashable
    ) -> Any:
        program, compile_s, _ = self._runner._program(function, arrays, donate, static)
        self.compile_s += compile_s
        self.peak_memory_bytes = max(self.peak_memory_bytes, program.peak_memory_bytes)
        return program.result_shapes


@dataclass(frozen=True)
class _Program:
    run: Any
    result_shapes: Any
    peak_memory_bytes: int


class _AbandonedError(Exception):
    """The thread that compiled a program was interrupted."""


@dataclass(eq=False)
class _Entry:
    key: Hashable
    program: Future[_Program] = field(default_factory=Future)
    used: int = 0  # its last use, numbered by `_uses`


def is_exhausted(error: BaseException) -> bool:
    """Returns whether an error says that the device has no memory left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def shapes_of(tree: Any, placement: jax.sharding.Sharding | None = None) -> Any:
    """Returns a tree of arrays as `jax.ShapeDtypeStruct`s with that placement, or with each array's own."""

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement or leaf.sharding)

    return jax.tree.map(shape_of, tree)


def _shape_at(leaf: Any, placement: jax.sharding.Sharding | None) -> Any:
    """Returns an array on the host as its shape, which is to be placed so; others as they are."""
    if not isinstance(leaf, np.ndarray | np.generic) and leaf.sharding is not None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)


def _shape_of(leaf: Any) -> Hashable:
    """Returns what a program depends on: an array's shape, dtype, placement (`None`: on the host) and weak type."""
    known = _array_shapes.get(id(leaf))
    if known is not None and known[0]() is leaf:
        return known[1]
    shape = _read_shape(leaf)
    if isinstance(leaf, jax.Array):
        if len(_array_shapes) >= REMEMBERED_ARRAYS:
            _array_shapes.clear()
        _array_shapes[id(leaf)] = weakref.ref(leaf), shape
    return shape


def _read_shape(leaf: Any) -> Hashable:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype, None, False
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (sharding,) = sharding.device_set  # however its memory kind is written
    return leaf.shape, leaf.dtype, sharding, leaf.weak_type


def _without_layout(shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shape.sharding, weak_type=shape.weak_type)


def _make_room() -> None:
    """Drops the process's least recently used programs while it has mapped nearly all the regions that it may.

    Counting regions takes milliseconds, so it is left out while there is room for several programs.
    """
    global _programs_with_room
    with _lock:
        _programs_with_room -= 1
        if _programs_with_room > 0:
            return
    while (share := mapped_share()) > MAX_MAPPED_SHARE:
        dropped = _drop_oldest()
        if not dropped:
            return
        _warn_of_drops()
        logger.debug("dropped %d compiled programs", dropped)
    _programs_with_room = min(int((MAX_MAPPED_SHARE - share) / SHARE_OF_A_PROGRAM), EVICTED_AT_ONCE)


def _drop_oldest() -> int:
    """Drops some programs and returns how many. They have been freed by then."""
    global _drops
    with _lock:
        made = [(entry, where._entries) for where in _cpu_runners for entry in where._entries.values()]
        made = [(entry, entries) for entry, entries in made if entry.program.done()]
        oldest = sorted(made, key=lambda each: each[0].used)[:-MIN_KEPT][:EVICTED_AT_ONCE]
        for entry, entries in oldest:
            del entries[entry.key]
        _drops += bool(oldest)
    return len(oldest)


@cache
def _warn_of_drops() -> None:
    logger.warning(
        "from now on, the least recently used compiled programs are dropped: this process has mapped nearly as many "
        "regions of memory as the system allows; raise vm.max_map_count, or use fewer programs (length_buckets)"
    )


@cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Returns the platform's compiler options but those that XLA no longer knows: they only make programs faster."""
    options = COMPILER_OPTIONS.get(platform, {})
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        logger.warning("programs are compiled without %s: %s", name, error)
        return False
    return True


def mapped_share() -> float:
    """Returns the share of its allowed memory regions that this process has mapped; 0 where that is unknown."""
    try:
        most = int(MAX_REGIONS_FILE.read_text())
        with REGIONS_FILE.open("rb") as mapped:
            return sum(1 for _ in mapped) / most
    except (OSError, ValueError):
        return 0.0


def _peak_memory_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes
