"""Runs planned prefills on a model's device, by either executor, and holds their programs, buffers and threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import numpy as np

from cacheblend_jax.blend.buckets import FINE_BUCKETS, Buckets, buckets_up_to, small_bucket
from cacheblend_jax.blend.layer_step import PromptSequence, blends_in_place
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import Prefilled, Request
from cacheblend_jax.blend.streamed import (
    LayerSource,
    ShapeSource,
    first_layer_read,
    layers_wanted,
    prefill_streamed,
)
from cacheblend_jax.choices import EXECUTORS
from cacheblend_jax.engine.delivery import Delivery
from cacheblend_jax.engine.device_entries import on_device, rows_to_place
from cacheblend_jax.engine.device_layers import LayersOnDevice
from cacheblend_jax.engine.entry_pages import place_pages
from cacheblend_jax.engine.generation import angles_of
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import place_chunk
from cacheblend_jax.engine.pauses import PausingLayers, Remembered, Span, Speed, stretches, total_s
from cacheblend_jax.engine.planner import choose_executor, empty_request
from cacheblend_jax.engine.results import PrefillRun
from cacheblend_jax.engine.standalone import Standalone
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.quantised_kv import StoredCache, abstract_stored, stored_layer
from cacheblend_jax.runtime.link import Link
from cacheblend_jax.runtime.placing import put
from cacheblend_jax.runtime.programs import Prepared, is_exhausted, shapes_of
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkEntry, DeviceEntry, Store
from cacheblend_jax.store.quantise import FLOAT8, INT8

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_Inputs = tuple[Request, list[jax.Array], PromptSequence]  # of a streamed prefill, on the device


@dataclass(frozen=True)
class _Job:
    """A prefill to run; `pause` is `None` for one without pauses."""

    plan: Plan
    request: Request
    chunks: Sequence[PlacedChunk]
    prepared: Prepared
    trace: Trace | None
    pause: Remembered | None


class Executors:
    """Runs the prefills of one model, one at a time: those of one lane (`Groups`).

    Args:
        setting: `"resident"` (all cached KV on the device, one program), `"streamed"` (each layer's KV arrives
            while others compute), or `"auto"`: see `choose_executor`.
        prefetch_layers, link, kept_bytes: see `Delivery`.
        beside: another lane's on the same devices, whose `alone` and what it knows of speed these share.
        tiers: those that the store may serve entries from.
        context_embeddings: of a fitted context, see `ChunkContext`.
        drop_device: has the store give the device memory back; returns whether it had any.

    Attributes:
        alone: computes chunks' stand-alone KV.
        kv_dtype: how the store keeps what is put into it from now on; warm-up compiles for that.

    Raises:
        CacheBlendError: an unknown executor, or a `prefetch_layers` that is not a positive whole number.
    """

    def __init__(
        self,
        model: Model,
        setting: str,
        prefetch_layers: int,
        *,
        beside: Executors | None = None,
        buckets: Buckets = FINE_BUCKETS,
        tiers: Sequence[str] = ("host",),
        context_embeddings: np.ndarray | None = None,
        drop_device: Callable[[], bool] = lambda: False,
        link: Link | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        if setting not in EXECUTORS:
            raise CacheBlendError(f"unknown executor {setting!r}; expected one of {', '.join(EXECUTORS)}")
        self.setting = setting
        self.delivery = Delivery(model, prefetch_layers, link, kept_bytes)
        self.uses_device_tier = "device" in tiers and setting != "streamed" and not model.spans_hosts
        self._model, self._buckets, self._tiers = model, buckets, tiers
        self._whole = model if model.whole is None else model.whole
        self.alone: Standalone = Standalone(model, buckets, context_embeddings) if beside is None else beside.alone
        self._drop_device = drop_device
        self.kv_dtype: str | None = None
        self._speed: Speed = Speed(model.config) if beside is None else beside._speed
        if not model.spans_hosts:  # the others would not begin anew
            for runner in {model.runner, self._whole.runner}:
                runner.add_yielding(self._give_way)

    def settings(self) -> dict[str, object]:
        """Returns what decides, beside a plan, which programs run: the same on all hosts."""
        delivery = self.delivery
        return {
            "executor": self.setting,
            "prefetch_layers": delivery.prefetch_layers,
            "length_buckets": self._buckets,
            "streaming from host memory": delivery.host_streams,
            "quantised KV on the device": delivery.kv_dtypes,
        }

    def agree_on_kv_dtype(self, store: Store) -> None:
        """Has a store quantise to int8 where it would to float8, which the device lacks; says so."""
        if store.kv_dtype == FLOAT8 and FLOAT8 not in self.delivery.kv_dtypes:
            logger.warning("the device has no %s: KV is stored as %s instead", FLOAT8, INT8)
            store.kv_dtype = INT8
        self.kv_dtype = store.kv_dtype

    # --- compiling: the loops below, run over shapes -----------------------------------------------------------------

    def prepare(self, plan: Plan, chunks: Sequence[PlacedChunk], *, pausing: bool = False) -> Prepared:
        """Compiles the programs that a plan needs to run with these chunks, except those that are ready.

        Args:
            pausing: whether it is to pause; see `run`.
        """
        return self.preparation(plan, chunks, pausing=pausing)()

    def preparation(
        self, plan: Plan, chunks: Sequence[PlacedChunk], *, pausing: bool = False
    ) -> Callable[[], Prepared]:
        """Returns what `prepare` does, for any thread and any time: it needs the chunks no more."""
        executor, kv_dtype = self._executor(plan, chunks, pausing), self.delivery.kv_dtype(chunks)
        rows = rows_to_place(chunks, kv_dtype) if executor != "streamed" else set()

        def prepare() -> Prepared:
            prepared = self._prepare_plan(plan, executor, kv_dtype)
            placing = self._prepare_placing(plan, rows, kv_dtype)
            return Prepared(prepared.compile_s + sum(each.compile_s for each in placing), prepared.peak_memory_bytes)

        return prepare

    def is_prepared(self, plan: Plan, chunks: Sequence[PlacedChunk], *, pausing: bool = False) -> bool:
        """Returns whether a plan's own programs are compiled; chunks that are on the device already may need others."""
        name = self._name(plan, self._executor(plan, chunks, pausing), self.delivery.kv_dtype(chunks))
        return self._model.runner.is_prepared(name)

    def is_ready(self, plan: Plan, chunks: Sequence[PlacedChunk], *, pausing: bool = False) -> bool:
        """As `is_prepared`, and whether those are that place chunks which are on the device already."""
        executor, kv_dtype = self._executor(plan, chunks, pausing), self.delivery.kv_dtype(chunks)
        placing = [(place_chunk, plan.cache_length, rows, kv_dtype) for rows in rows_to_place(chunks, kv_dtype)]
        names = [self._name(plan, executor, kv_dtype), *(placing if executor != "streamed" else [])]
        return all(map(self._model.runner.is_prepared, names))

    def warm_up(self, plan: Plan, tiers: Collection[str] = (), *, pausing: bool = False) -> None:
        """Compiles a plan for the executor that runs it where its chunks come from these tiers; for any, where none.

        The chunks are taken to be stored as the store does now (`kv_dtype`).

        Args:
            pausing: also for a run that pauses.
        """
        loads = not plan.nothing_cached
        sources = [tiers] if tiers else [[tier] for tier in self._tiers]
        executors = {self._choose(source if loads else []) for source in sources}
        if pausing and "resident" in executors:
            executors.add("by layer")
        for executor in executors:
            self._prepare_plan(plan, executor, self.kv_dtype)
        if self.uses_device_tier and loads:
            self._prepare_placing(plan, buckets_up_to(small_bucket, plan.cache_length), self.kv_dtype)

    def is_long(self, plan: Plan) -> bool:
        """Returns whether a plan would keep others waiting for long, as far as is known by now: then it is to pause."""
        return self._speed.is_long(plan)

    def runs_whole_meanwhile(self, plan: Plan, chunks: Sequence[PlacedChunk]) -> bool:
        """Returns whether a plan that is to pause runs without, while what pauses is compiled beside it.

        If all else is ready, and others can bear to wait for so long.
        """
        if self.is_ready(plan, chunks, pausing=True) or not self._speed.is_bearable(plan):
            return False
        return self.is_ready(plan, chunks)

    def _executor(self, plan: Plan, chunks: Sequence[PlacedChunk], pausing: bool = False) -> str:
        """Returns `"resident"`, `"streamed"`, or, for a resident plan that is to pause, `"by layer"`."""
        executor = self._choose([] if plan.nothing_cached else [chunk.tier for chunk in chunks])
        return "by layer" if executor == "resident" and pausing else executor

    def _choose(self, tiers: Collection[str]) -> str:
        return choose_executor(self.setting, tiers, host_streams=self.delivery.host_streams)

    def _name(self, plan: Plan, executor: str, kv_dtype: str | None) -> Hashable:
        takes_pages = executor == "streamed" and self.delivery.takes_pages(plan, kv_dtype)
        return plan, executor, None if plan.nothing_cached else kv_dtype, takes_pages

    def _prepare_plan(self, plan: Plan, executor: str, kv_dtype: str | None) -> Prepared:
        over_shapes = partial(self._run_over_shapes, plan, executor, kv_dtype)
        return self._model.runner.prepare(self._name(plan, executor, kv_dtype), over_shapes)

    def _run_over_shapes(self, plan: Plan, executor: str, kv_dtype: str | None, run: Callable[..., Any]) -> None:
        """Does what the executor does with a request of the plan, with `run` in the runner's place."""
        request, model = empty_request(plan), self._model
        stack = abstract_stored(model.config, plan.cache_length, model.cache_placement, kv_dtype)
        cached = None if plan.nothing_cached else stack
        if executor == "resident":
            self._prefill_resident(run, plan, request, cached)
        elif executor == "by layer":
            inputs, layers = self._streamed_inputs(plan, request), self._layers_on_device(run, plan, cached)
            self._prefill_streamed(run, plan, inputs, layers, self._becoming_blended(cached))
        else:
            layer = shapes_of(jax.eval_shape(lambda kv: stored_layer(kv, 0), stack), model.layer_placement)
            self._prefill_streamed(run, plan, self._streamed_inputs(plan, request), ShapeSource(layer))
            if self.delivery.takes_pages(plan, kv_dtype):
                run(place_pages, stack, *self.delivery.abstract_pages(), donate=("cache",))
                run(stored_layer, stack, self._layer_indices[0])

    def _prepare_placing(self, plan: Plan, sizes: Iterable[int], kv_dtype: str | None) -> list[Prepared]:
        """Compiles the programs that place chunks already on the device, for each number of rows in `sizes`."""

        def place_both(rows: int, run: Callable[..., Any]) -> None:
            chunk = abstract_stored(self._model.config, rows, self._model.cache_placement, kv_dtype)
            place_chunk(
                run, place_chunk(run, None, chunk, 0, rows, plan.cache_length), chunk, 0, rows, plan.cache_length
            )

        prepare = self._model.runner.prepare
        name = place_chunk, plan.cache_length
        return [prepare((*name, rows, kv_dtype), partial(place_both, rows)) for rows in sorted(sizes)]

    # --- the programs: run by the runner, or over shapes by what stands in for it -------------------------------------

    def _prefill_resident(
        self, run: Callable[..., Any], plan: Plan, request: Request, cached: StoredCache | None
    ) -> Prefilled:
        model, sequence = self._model, self._sequence(request.length, plan.cache_length)
        donate = () if self._becoming_blended(cached) is None else ("cached",)
        return run(prefill, model.params, request, cached, sequence, donate=donate, config=model.config, plan=plan)

    def _becoming_blended(self, cached: StoredCache | None) -> KVCache | None:
        """Returns the stored KV where it becomes the blended KV in place; else `None`."""
        return cached if isinstance(cached, KVCache) and blends_in_place(self._model.platform) else None

    def _layers_on_device(self, run: Callable[..., Any], plan: Plan, cached: StoredCache | None) -> LayersOnDevice:
        in_place = self._becoming_blended(cached) is not None
        return LayersOnDevice(run, plan, cached, self._layer_indices, in_place=in_place)

    def _prefill_streamed(
        self,
        run: Callable[..., Any],
        plan: Plan,
        inputs: _Inputs,
        layers: LayerSource,
        stored: KVCache | None = None,
    ) -> Prefilled:
        model, (request, keep, sequence) = self._model, inputs
        loop = run, model.step_params, request, keep, sequence, layers, self._layer_indices
        placing = self.delivery.takes_pages(plan, None)  # codes are placed by the step in any case
        return prefill_streamed(*loop, config=model.config, plan=plan, placing=placing, stored=stored)

    def _streamed_inputs(self, plan: Plan, request: Request) -> _Inputs:
        """Returns the request, its `keep`, and the prompt's sequence, on the device."""
        on_device, keep = self._put((request, list(np.asarray(request.keep))))
        return on_device, keep, self._sequence(on_device.length, plan.cache_length)

    @cached_property
    def _layer_indices(self) -> list[jax.Array]:
        return self._put([np.int32(layer) for layer in range(self._model.config.num_layers)])

    # --- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: Plan,
        request: Request,
        chunks: Sequence[PlacedChunk],
        prepared: Prepared,
        trace: Trace | None,
        between: Callable[[], object] | None = None,
    ) -> PrefillRun:
        """Runs a prepared prefill.

        Args:
            between: called about every `pauses.LONGEST_S`, between two layers; what it raises ends the prefill, which
                must have been prepared for that (`pausing`).

        Raises:
            LostChunkError: a chunk could not be read; nothing is left running.
        """
        pause = None if between is None else Remembered(between)
        run = self._run_streamed if self._executor(plan, chunks) == "streamed" else self._run_on_device
        job = _Job(plan, request, chunks, prepared, trace, pause)
        done = self._giving_way(lambda: run(job), pause)
        overlaps = done.executor == "streamed" and pause is None  # layers are computed while others are waited for
        self._speed.took(plan, done.run_s - done.paused_s - (0.0 if overlaps else done.load_s))
        return done

    def _giving_way(self, work: Callable[[], Result], pause: Remembered | None = None) -> Result:
        """Does some work, and once more if it (not others, in a pause) lacked memory that stored KV had there."""
        try:
            return work()
        except jax.errors.JaxRuntimeError as error:
            is_others = pause is not None and error is pause.raised
            if self._model.spans_hosts or is_others or not is_exhausted(error) or not self._give_way():
                raise
        return work()

    def _give_way(self) -> bool:
        """Gives back the memory that stored KV has on the device; returns whether there was any."""
        had_any = any([self.delivery.give_way(), self._drop_device()])
        if had_any:
            logger.warning(
                "the device ran out of memory: the KV of earlier prompts gives way, and the work begins anew"
            )
        return had_any

    def _run_on_device(self, job: _Job) -> PrefillRun:
        """Loads all stored KV, then runs one program, or, to pause, one for each layer."""
        plan, began = job.plan, time.perf_counter()
        cached = None if plan.nothing_cached else self.delivery.load(plan, job.chunks, job.trace)
        dispatched = time.perf_counter()
        peak = job.prepared.peak_memory_bytes
        pauses: Sequence[Span] = ()
        if job.pause is None:
            out = self._prefill_resident(self._model.runner, plan, job.request, cached)
        else:
            layers, stored = self._layers_on_device(self._model.runner, plan, cached), self._becoming_blended(cached)
            out, pauses = self._run_by_layer(job, self._streamed_inputs(plan, job.request), layers, stored)
            if stored is None:  # what is cached stays beside the blended KV
                peak += sum(array.nbytes for array in jax.tree.leaves(cached))
        next_token = int(out.next_token)
        ended = time.perf_counter()
        if job.trace is not None:
            for resumed, paused in stretches(dispatched, ended, pauses):
                job.trace.add("compute", "layers", -1, resumed, paused)
        return PrefillRun(out, next_token, "resident", dispatched - began, ended - began, peak, total_s(pauses))

    def _run_streamed(self, job: _Job) -> PrefillRun:
        plan, began = job.plan, time.perf_counter()
        inputs = self._streamed_inputs(plan, job.request)  # they would wait behind the layers
        needed, num_exact = job.prepared.peak_memory_bytes, sum(c.num_tokens for c in job.chunks if c.exact)
        first = first_layer_read(plan, job.request, num_exact)
        with self.delivery.stream(
            plan, job.chunks, needed, job.trace, first=first, layers=self._layer_indices
        ) as stream:
            out, pauses = self._run_by_layer(job, inputs, stream)
            next_token = int(out.next_token)
            ended = time.perf_counter()
        layer = self.delivery.layer_bytes(plan.cache_length, self.delivery.kv_dtype(job.chunks))
        peak = needed + stream.bytes_ahead(layer)
        return PrefillRun(out, next_token, "streamed", stream.waited_s, ended - began, peak, total_s(pauses))

    def _run_by_layer(
        self, job: _Job, inputs: _Inputs, layers: LayerSource, stored: KVCache | None = None
    ) -> tuple[Prefilled, Sequence[Span]]:
        """Runs a program for each layer; returns the pauses, too."""
        run, plan = self._model.runner, job.plan
        if job.pause is None:
            return self._prefill_streamed(run, plan, inputs, layers, stored), ()
        count = len(layers_wanted(plan, self._model.config.num_layers))
        pausing = PausingLayers(layers, count, job.pause, job.trace)
        return self._prefill_streamed(run, plan, inputs, pausing, stored), pausing.pauses

    def close(self) -> None:
        """See `Delivery.close`."""
        self.delivery.close()

    def to_device(self, entry: ChunkEntry) -> DeviceEntry:
        """Copies an entry to the device, padded so that chunks of many lengths share programs.

        On a mesh, it goes to the devices of all groups. Codes that the device does not read are dequantised first.
        """
        there = partial(put, placement=self._whole.cache_placement)
        return on_device(entry if entry.kv_dtype in self.delivery.kv_dtypes else entry.dequantised(), there)

    def standalone(self, chunk: PlacedChunk) -> ChunkEntry:
        """Computes a chunk's KV after its context alone; see `Standalone.entry`."""
        return self._giving_way(lambda: self.alone.entry(chunk))

    def _sequence(self, length: Any, num_keys: int) -> PromptSequence:
        return PromptSequence(length, angles_of(self._model, num_keys))

    def _put(self, tree: Any) -> Any:
        return put(tree, self._model.placement)
