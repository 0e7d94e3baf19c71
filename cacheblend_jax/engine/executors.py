"""Runs planned prefills on a model's device, by either executor: programs, host buffers and threads live here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.buckets import FINE_BUCKETS, Buckets, buckets_up_to, forced_bucket
from cacheblend_jax.blend.layer_step import LayerKV
from cacheblend_jax.blend.layer_step import Sequence as PromptSequence
from cacheblend_jax.blend.resident import prefill, standalone
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import Prefilled, Request
from cacheblend_jax.blend.streamed import Programs, layers_wanted, make_programs, prefill_streamed
from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.engine.layout import Layout, Missing
from cacheblend_jax.engine.loading import READERS, LayerStream, Placed, Staging, load_all, place, place_first
from cacheblend_jax.engine.planner import Planner, abstract_request
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.runtime.programs import Program
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkEntry, ChunkStore, DeviceChunk, DeviceEntry, ThrottledStore, is_slow

EXECUTORS = ("auto", "resident", "streamed")


@dataclass(frozen=True)
class Executed:
    """A prefill that has run: its results, and what it took. Times are in seconds."""

    out: Prefilled
    next_token: int
    executor: str
    load_s: float
    run_s: float
    peak_memory_bytes: int


class Execution:
    """Runs the prefills of one model, one at a time.

    Args:
        executor: `"resident"` (all cached KV on the device, one program), `"streamed"` (layer by layer while others
            compute), or `"auto"`: streamed where a chunk comes from a tier slower than host memory.
        prefetch_layers: the most layers of cached KV on the device while streaming.
        may_be_slow: whether the store has tiers slower than host memory.
        may_be_on_device: whether it keeps entries on the device.

    Raises:
        CacheBlendError: an unknown executor, or a `prefetch_layers` that is no positive count.
    """

    def __init__(
        self,
        model: Model,
        executor: str,
        prefetch_layers: int,
        *,
        buckets: Buckets = FINE_BUCKETS,
        may_be_slow: bool = False,
        may_be_on_device: bool = False,
    ) -> None:
        if executor not in EXECUTORS:
            raise CacheBlendError(f"unknown executor {executor!r}; expected one of {', '.join(EXECUTORS)}")
        if not isinstance(prefetch_layers, int) or isinstance(prefetch_layers, bool) or prefetch_layers < 1:
            raise CacheBlendError(f"prefetch_layers must be a whole number of at least 1, got {prefetch_layers!r}")
        self.executor = executor
        self.prefetch_layers = prefetch_layers
        self._model, self._buckets, self._may_be_slow = model, buckets, may_be_slow
        self.uses_device_tier = may_be_on_device and executor != "streamed"
        self._compiled: set[tuple[Plan, str]] = set()
        self._staging = Staging(jnp.dtype(model.config.dtype))
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="cacheblend-read")
        self._lanes = ThreadPoolExecutor(2, thread_name_prefix="cacheblend-lane")

    def chosen(self, plan: Plan, chunks: Sequence[Placed]) -> str:
        """Returns the executor of a prefill: where nothing is loaded there is nothing to stream."""
        if plan.nothing_cached or not chunks or self.executor == "resident":
            return "resident"
        slow = any(is_slow(placed.chunk.tier) for placed in chunks)
        return "streamed" if slow or self.executor == "streamed" else "resident"

    def compile(self, plan: Plan, executor: str, chunks: Sequence[Placed] = ()) -> float:
        """Compiles what a plan needs by that executor; returns the seconds it took, 0 where it was ready.

        Where it is to place `chunks` that are on the device, that includes the programs which do it.
        """
        if executor == "streamed" and not plan.nothing_cached:
            compile_s = self._streamed_programs(plan)[1]
        else:
            rows = {each.chunk.entry.k.shape[1] for each in chunks if isinstance(each.chunk, DeviceChunk)}
            compile_s = self._resident_program(plan).compile_s + self._compile_placing(plan, rows)
        self._compiled.add((plan, executor))
        return compile_s

    def has_compiled(self, plan: Plan, executor: str) -> bool:
        """Whether this plan has been compiled for that executor."""
        return (plan, executor) in self._compiled

    def _compile_placing(self, plan: Plan, rows: Iterable[int]) -> float:
        return sum(
            self._placing_program(plan, size, first).compile_s for size in sorted(rows) for first in (True, False)
        )

    def warm_up(self, plan: Plan) -> None:
        """Compiles a plan for the executors that its requests may be run by.

        With `"auto"` that is the streamed one too, unless the store keeps everything in memory.
        """
        may_load = not plan.nothing_cached
        if self.executor != "streamed" or not may_load:
            self.compile(plan, "resident")
        if self.uses_device_tier and may_load:
            self._compile_placing(plan, buckets_up_to(forced_bucket, plan.cache_length))
        if may_load and (self.executor == "streamed" or (self.executor == "auto" and self._may_be_slow)):
            self.compile(plan, "streamed")

    def run(self, plan: Plan, request: Request, chunks: Sequence[Placed], trace: Trace | None) -> Executed:
        """Runs a prefill; `run_s` ends with the first token on the host.

        Raises:
            LostChunkError: a chunk could not be read; nothing is left running.
        """
        if self.chosen(plan, chunks) == "streamed":
            return self._run_streamed(plan, request, chunks, trace)
        return self._run_resident(plan, request, chunks, trace)

    def load(self, plan: Plan, chunks: Sequence[Placed], trace: Trace | None = None) -> LayerKV:
        """Assembles all stored KV at its places, on the device; rows of forced tokens are to be overwritten.

        What is on the device already stays there; where all of it is, nothing is transferred.
        """
        config = self._model.config
        there = [(each, each.chunk.entry) for each in chunks if isinstance(each.chunk, DeviceChunk)]
        cached, began = None, time.perf_counter()
        if not there or len(there) < len(chunks):
            k, v = self._staging.arrays((config.num_layers, *self._layer_shape(plan)))
            load_all([each for each in chunks if not isinstance(each.chunk, DeviceChunk)], k, v, self._readers, trace)
            began = time.perf_counter()
            cached = LayerKV(*self._put((k, v)))
        for placed, entry in there:
            cached = self._place(plan, cached, placed.start, entry)
        jax.block_until_ready(cached)
        if trace is not None:
            trace.add("transfer", "all layers", -1, began, time.perf_counter())
        assert cached is not None
        return cached

    def to_device(self, entry: ChunkEntry) -> DeviceEntry:
        """Copies an entry to the device, padded so that chunks of many lengths share programs."""
        shape = (entry.k.shape[0], forced_bucket(entry.num_tokens), *entry.k.shape[2:])
        k, v = np.zeros(shape, entry.k.dtype), np.zeros(shape, entry.v.dtype)
        k[:, : entry.num_tokens], v[:, : entry.num_tokens] = entry.k, entry.v
        k, v = self._put((k, v))
        return DeviceEntry(k, v, entry.num_tokens, entry.fingerprint, entry.context_ids)

    def _place(self, plan: Plan, cached: LayerKV | None, start: int, entry: DeviceEntry) -> LayerKV:
        program = self._placing_program(plan, entry.k.shape[1], cached is None)
        # Another engine may have put it elsewhere.
        arguments = (*self._put((entry.k, entry.v)), np.int32(start), np.int32(entry.num_tokens))
        return self._put(program.run(*arguments) if cached is None else program.run(cached, *arguments))

    def standalone(self, missing: Missing) -> ChunkEntry:
        """Computes a chunk's KV after its context alone.

        Raises:
            CacheBlendError: the weights are no longer those that the chunk's key was made with.
        """
        config = self._model.config
        ids = np.concatenate([missing.context_ids, missing.token_ids])
        size = self._buckets.length(ids.size)
        padded = np.zeros(size, np.int32)
        padded[: ids.size] = ids
        tables = self._put(rope_tables(config, size))
        kv = self.standalone_program(size).run(self._model.params, padded, np.int32(ids.size), *tables)
        begin = missing.context_ids.size
        k, v = (np.ascontiguousarray(np.asarray(x)[:, begin : ids.size]) for x in (kv.k, kv.v))
        if self._model.fingerprint != missing.fingerprint:
            raise CacheBlendError("the model's weights were changed while a chunk waited to be stored: it is not")
        return ChunkEntry(k, v, missing.fingerprint, tuple(missing.context_ids.tolist()))

    def standalone_program(self, size: int) -> Program:
        """The program that computes the KV of a context and a chunk, padded to `size` tokens."""
        config = self._model.config

        def arguments() -> tuple[Any, ...]:
            table = self._abstract((size, config.head_dim // 2), jnp.float32)
            scalar = jax.ShapeDtypeStruct((), jnp.int32)
            return self._model.params, jax.ShapeDtypeStruct((size,), jnp.int32), scalar, table, table

        return self._model.programs.get(standalone, arguments, config=config, rows=size)

    def _run_resident(self, plan: Plan, request: Request, chunks: Sequence[Placed], trace: Trace | None) -> Executed:
        program = self._resident_program(plan)
        tables = self._put(rope_tables(self._model.config, plan.cache_length))
        began = time.perf_counter()
        cached = None if plan.nothing_cached else self.load(plan, chunks, trace)
        dispatched = time.perf_counter()
        out = program.run(self._model.params, request, cached, *tables)
        next_token = int(out.next_token)
        ended = time.perf_counter()
        if trace is not None:
            trace.add("compute", "all layers", -1, dispatched, ended)
        load_s = dispatched - began
        peak = program.peak_memory_bytes
        return Executed(out, next_token, "resident", load_s, ended - began, peak)

    def _run_streamed(self, plan: Plan, request: Request, chunks: Sequence[Placed], trace: Trace | None) -> Executed:
        programs, _, peak = self._streamed_programs(plan)
        config, params = self._model.config, self._model.params
        shape = self._layer_shape(plan)
        buffers = self._staging.arrays((self.host_layers, *shape))
        began = time.perf_counter()
        layers = layers_wanted(plan, config.num_layers)
        stream = LayerStream(
            chunks, layers, buffers, self.prefetch_layers, self._put, self._readers, self._lanes, trace
        )
        with stream:
            on_device, tables = self._put((request, rope_tables(config, plan.cache_length)))
            sequence = PromptSequence(on_device.length, *tables)
            out = prefill_streamed(
                programs, params, on_device, stream, sequence, plan=plan, keep=np.asarray(request.keep)
            )
            next_token = int(out.next_token)
            ended = time.perf_counter()
        layer_bytes = 2 * int(np.prod(shape)) * jnp.dtype(config.dtype).itemsize
        peak += (self.prefetch_layers - 1) * layer_bytes
        return Executed(out, next_token, "streamed", stream.waited_s, ended - began, peak)

    @property
    def host_layers(self) -> int:
        """Layers that are read ahead into host memory: half of them.

        While the layers up to the check layer compute all tokens, a tier that is about as fast as the whole recompute
        delivers several others; were there no room for them, it would stand still.
        """
        return max(self.prefetch_layers, -(-self._model.config.num_layers // 2))

    def _layer_shape(self, plan: Plan) -> tuple[int, int, int]:
        return plan.cache_length, self._model.config.num_kv_heads, self._model.config.head_dim

    def _resident_program(self, plan: Plan) -> Program:
        def arguments() -> tuple[Any, ...]:
            config = self._model.config
            stacked: Any = self._abstract((config.num_layers, *self._layer_shape(plan)), config.dtype)
            cached = None if plan.nothing_cached else LayerKV(stacked, stacked)
            table = self._abstract((plan.cache_length, config.head_dim // 2), jnp.float32)
            return self._model.params, abstract_request(plan), cached, table, table

        return self._model.programs.get(prefill, arguments, config=self._model.config, plan=plan)

    def _placing_program(self, plan: Plan, rows: int, first: bool) -> Program:
        """Puts a chunk of so many rows into a plan's KV, or makes the KV of the first."""
        config, keys = self._model.config, plan.cache_length

        def arguments() -> tuple[Any, ...]:
            chunk = self._abstract((config.num_layers, rows, config.num_kv_heads, config.head_dim), config.dtype)
            scalar = jax.ShapeDtypeStruct((), jnp.int32)
            stacked: Any = self._abstract((config.num_layers, *self._layer_shape(plan)), config.dtype)
            return (*(() if first else (LayerKV(stacked, stacked),)), chunk, chunk, scalar, scalar)

        if first:
            return self._model.programs.get(place_first, arguments, keys=keys, rows=rows)
        return self._model.programs.get(place, arguments, donate=(0,), keys=keys, rows=rows)

    def _streamed_programs(self, plan: Plan) -> tuple[Programs, float, int]:
        """Returns a plan's programs, the seconds waited for their compilation, and the most memory one takes."""
        made: list[Program] = []

        def compiled(*args: Any, **options: Any) -> Any:
            made.append(self._model.programs.get(*args, **options))
            return made[-1].run

        model = self._model
        programs = make_programs(
            compiled, model.params, abstract_request(plan), config=model.config, plan=plan, placement=model.placement
        )
        return programs, sum(program.compile_s for program in made), max(program.peak_memory_bytes for program in made)

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._model.placement)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._model.placement)


@dataclass(frozen=True)
class Attempt:
    """A prefill that went through."""

    layout: Layout
    plan: Plan
    ran: Executed
    compile_s: float
    planner: Planner
    decision: Decision | None


class Timer:
    """Measures a request without what is no part of it: compilation, the oracle."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The body takes no time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def may_be_slow(store: ChunkStore | ThrottledStore) -> bool:
    """Whether a store has tiers slower than host memory."""
    return isinstance(store, ThrottledStore) or store.directory is not None
