"""One prefill: places and looks up the chunks, asks the controller, then makes, prepares and runs a plan.

Chunks that the store lacks are computed in place, and stored after the first token is out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from cacheblend_jax.blend.deviation import total_deviation
from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.blend.schedule import Plan, computed_positions
from cacheblend_jax.blend.steps import Request
from cacheblend_jax.engine.agreement import Alone, Choice, Together
from cacheblend_jax.engine.aside import Aside
from cacheblend_jax.engine.background import Background
from cacheblend_jax.engine.controller import Decision, decide
from cacheblend_jax.engine.delays import Estimator
from cacheblend_jax.engine.entry_pages import page_rows
from cacheblend_jax.engine.groups import Groups, Lane
from cacheblend_jax.engine.layout import ChunkContext, Layout, PlacedChunk, lay_out, look_up, place_chunks
from cacheblend_jax.engine.loading import LostChunkError
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.profile import Profile, profile_for
from cacheblend_jax.engine.prompt import Prompt, TokenizedPrompt, tokenize_prompt
from cacheblend_jax.engine.results import PrefillResult, PrefillRun, PrefillStats
from cacheblend_jax.engine.shared_reads import Opens
from cacheblend_jax.errors import NotReadyError
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.quantised_kv import cache_values
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.runtime.placing import on_host
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import Store, is_slow

logger = logging.getLogger(__name__)


class Prefiller:
    """Prefills prompts, as many at a time as there are lanes (`Groups`).

    Args:
        context: what chunks are precomputed after.
        profile: see `Engine`.
        agreement: what all hosts decide together.

    Attributes:
        is_warm: whether programs were compiled in advance. Then a request that waits for the compiler is logged, and
            the controller considers only what is compiled.
    """

    def __init__(
        self,
        model: Model,
        store: Store,
        groups: Groups,
        background: Background,
        *,
        context: ChunkContext,
        profile: Profile | Path | str | None,
        agreement: Alone | Together,
        store_missing: bool,
    ) -> None:
        self._store_missing = store_missing
        self._model, self._store, self._groups, self._background = model, store, groups, background
        self._context, self._profile, self._agreement = context, profile, agreement
        self._tiers = store.tiers
        groups.agree_on_kv_dtype(store)
        self._estimator: Estimator | None = None
        self._estimating = threading.Lock()
        self._aside = Aside()
        self.is_warm = False

    def tokenize(self, prompt: Prompt | TokenizedPrompt) -> TokenizedPrompt:
        """Tokenises a prompt and checks it against the model (see `tokenize_prompt`), unless that has been done."""
        if isinstance(prompt, TokenizedPrompt):
            return prompt
        config = self._model.config
        limits = {"vocab_size": config.vocab_size, "max_tokens": config.max_positions}
        return tokenize_prompt(prompt, self._model.tokenizer, **limits)

    def place(self, tokenized: TokenizedPrompt, mode: str) -> list[PlacedChunk]:
        """Places the chunks that a mode looks up."""
        return place_chunks(
            tokenized,
            mode,
            context=self._context,
            fingerprint=self._model.fingerprint,
            salt=self._store.salt,
        )

    def prefill(
        self,
        tokenized: TokenizedPrompt,
        mode: str,
        planner: Planner,
        trace: Trace | None = None,
        reads: Opens | None = None,
        only_if_ready: bool = False,
        group: int | None = None,
        between: Callable[[], object] | None = None,
    ) -> PrefillResult:
        """Prefills a prompt in a mode; see `Engine.prefill`. `reads` opens entries in the store's place."""
        call = _Call(tokenized, mode, planner, trace, only_if_ready, between if self._agreement.is_alone else None)
        with self._agreement.request():
            return self._prefill(call, reads, group)

    def _prefill(self, call: _Call, reads: Opens | None, group: int | None) -> PrefillResult:
        self._model.compute_fingerprint()  # once per model, and not part of a request's time
        call.timer = Timer()
        chunks: Sequence[PlacedChunk] = self.place(call.tokenized, call.mode)
        placed_s = call.timer.elapsed_s()
        storing = self._background.next_of([chunk.key for chunk in chunks])
        if storing and call.only_if_ready:
            raise NotReadyError("chunks of the prompt are being stored", partial(wait, storing))
        wait(storing)
        with self._groups.turn(group) as call.lane, ExitStack() as handles:
            call.timer.wait_s = call.timer.elapsed_s() - placed_s
            chunks, unusable = look_up(chunks, reads or self._store, handles, self._model.config)
            call.lost.update(unusable)
            chunks = self._agreement.opened(chunks, call.asked)
            layout, result = self._attempt_until_read(call, chunks)
        for chunk in layout.missing if self._store_missing else ():
            if chunk.is_within(self._model.config.max_positions):  # `precompute` refuses others
                self._background.store_later(chunk, again=chunk.key in call.lost)
        for chunk in layout.loaded:
            if is_slow(chunk.tier) or (chunk.tier == "host" and self._groups.first.uses_device_tier):
                self._background.promote_later(chunk.key, chunk.handle.num_bytes)
        return result

    def close(self) -> None:
        """Ends the executors' threads, after the prefills that are running."""
        self._aside.close()
        self._groups.close()

    def _attempt_until_read(self, call: _Call, chunks: Sequence[PlacedChunk]) -> tuple[Layout, PrefillResult]:
        """Runs a prefill, and once more if a chunk cannot be read, with what is surely in memory."""
        while True:
            try:
                return self._attempt(call, chunks)
            except LostChunkError as error:  # costs this request its hits, never its answer
                logger.warning("a stored chunk could not be read and is computed instead: %s", error)
                call.lost.add(error.key)
                call.failed_tiers.add(error.tier)
                chunks = [replace(chunk, stored=None) if chunk.key == error.key else chunk for chunk in chunks]

    def _attempt(self, call: _Call, chunks: Sequence[PlacedChunk]) -> tuple[Layout, PrefillResult]:
        """Runs a prefill with the stored chunks that can be trusted.

        Raises:
            LostChunkError: a chunk could not be read.
        """
        planned = self._plan(call, chunks)
        plan, loaded, executors = planned.plan, planned.layout.loaded, call.lane.executors
        # Decided once: a prefill in another lane changes what seems to take long, and what is compiled.
        wants_pauses, pausing = call.wants_pauses(plan), call.pauses(plan, loaded)
        if wants_pauses and not pausing:
            self._aside.do(plan, self._groups.preparation(plan, loaded, pausing=True))
        if call.only_if_ready and not executors.is_ready(plan, loaded, pausing=pausing):
            self._warn_of_compiling(plan)
            preparation = self._groups.preparation(plan, loaded, pausing=pausing)
            raise NotReadyError("the prompt's programs are not compiled", preparation)
        with call.timer.stopped():
            if plan.needs("oracle"):
                self._add_oracle(call, planned)
            prepared = executors.prepare(plan, loaded, pausing=pausing)
            if prepared.compile_s > 0:
                self._warn_of_compiling(plan)
        try:
            arguments = plan, planned.request, loaded, prepared, call.trace, call.between if pausing else None
            run = self._agreement.run(lambda: executors.run(*arguments))
            self._agreement.check_read(loaded)
        except BaseException:
            if not self._agreement.is_alone:  # what it has left on the device may be zeros
                executors.delivery.forget(plan, loaded)
            raise
        return planned.layout, self._result(call, planned, run, prepared.compile_s)

    def _warn_of_compiling(self, plan: Plan) -> None:
        if self.is_warm:
            logger.warning("a request waits for the compiler: warm-up did not cover %s", plan)

    def _plan(self, call: _Call, chunks: Sequence[PlacedChunk]) -> _Planned:
        """Makes the plan of what was chosen: on several hosts, by the first."""
        return self._planned(call, chunks, self._agreement.choice(lambda: self._choose(call, chunks)))

    def _choose(self, call: _Call, chunks: Sequence[PlacedChunk]) -> Choice:
        """Chooses the ratio and what is loaded, where the controller is asked.

        Where chunks are missing since a tier fails, no request is to wait for the compiler: all is computed, if the
        program for that is ready and the plan's are not.
        """
        planner, ratio, decision = call.planner, None, None
        computed = {chunk.start for chunk in chunks if chunk.stored is not None and not call.trusts(chunk.tier)}
        if planner.blend.is_auto:
            if call.mode == "blend":
                if call.only_if_ready and self._estimator is None:
                    raise NotReadyError("nothing is known yet of how long prefills take", self.estimator)
                stored = [chunk for chunk in chunks if chunk.stored is not None and chunk.start not in computed]
                decision = self._decide(call, stored)
                computed.update(decision.computed_starts)
            ratio = planner.blend.auto_ratios[0] if decision is None else decision.ratio
        choice = Choice(ratio, frozenset(computed), decision)
        is_failing = bool(call.lost) or not set(self._tiers) <= set(self._store.tiers)
        if is_failing and not self._is_ready(call, self._planned(call, chunks, choice)):
            in_full = replace(choice, computed_starts=frozenset(chunk.start for chunk in chunks))
            if self._is_ready(call, self._planned(call, chunks, in_full)):
                return in_full
        return choice

    def _is_ready(self, call: _Call, planned: _Planned) -> bool:
        plan, loaded = planned.plan, planned.layout.loaded
        return call.lane.executors.is_ready(plan, loaded, pausing=call.pauses(plan, loaded))

    def _planned(self, call: _Call, chunks: Sequence[PlacedChunk], choice: Choice) -> _Planned:
        planner = call.planner if choice.ratio is None else call.planner.at(choice.ratio)
        context = self._context.shared_with(call.tokenized.prefix)
        layout = lay_out(call.tokenized, chunks, context_length=context.size, compute=choice.computed_starts)
        return _Planned(planner, layout, *planner.plan_layout(layout, call.mode), choice.decision)

    def _decide(self, call: _Call, stored: Sequence[PlacedChunk]) -> Decision:
        """Asks the controller for a request's ratio, and for which of the stored chunks to load."""
        with call.timer.stopped():  # a quick estimate is not part of the request's time
            estimator = self.estimator()
        executors, length = call.lane.executors, call.tokenized.token_ids.size
        delivery = executors.delivery

        def is_prepared(plan: Plan, chunks: Sequence[PlacedChunk]) -> bool:
            return executors.is_prepared(plan, chunks, pausing=call.pauses(plan, chunks))

        asked = is_prepared if self.is_warm else None
        return decide(estimator, call.planner, length, stored, asked, delivery.num_kept, delivery.kv_dtype)

    def estimator(self) -> Estimator:
        """Returns what the controller estimates delays from; made once, from the profile or a quick estimate."""
        with self._estimating:
            if self._estimator is None:
                profile, name = profile_for(self._model, self._store.directory, self._profile)
                delivery = self._groups.first.delivery
                self._estimator = Estimator(
                    name,
                    profile.compute,
                    profile.tiers,
                    delivery.transfer(profile),
                    delivery.host_layers,
                    delivery.prefetch_layers,
                    executor=self._groups.first.setting,
                    host_streams=delivery.host_streams,
                    page_rows=page_rows(self._model.config) if delivery.reads_entries else 0,
                )
            return self._estimator

    def _add_oracle(self, call: _Call, planned: _Planned) -> None:
        """Fills in the oracle's scores from a full prefill."""
        plan, layout, request = planned.plan, planned.layout, planned.request
        whole = _Call(call.tokenized, "full", planned.planner, None, call.only_if_ready, call.between)
        whole.lane = call.lane
        full = self._attempt(whole, [])[1].padded_cache
        rows = min(full.k.shape[1], plan.cache_length)
        config = self._model.config
        params = call.lane.model.params
        plain = jax.jit(cache_values, static_argnames="config")(
            params, call.lane.executors.delivery.load(plan, layout.loaded), config=config
        )
        scores = jax.jit(total_deviation, static_argnames="config")(
            full.first(rows), plain.first(rows), rope_tables(config, rows), layout.token_ids.size, config=config
        )
        count = int(np.sum(request.positions < plan.cache_length))
        request.oracle[:count] = on_host(scores)[request.positions[:count]]

    def _result(self, call: _Call, planned: _Planned, run: PrefillRun, compile_s: float) -> PrefillResult:
        layout, ttft_s = planned.layout, call.timer.elapsed_s()
        computed = computed_positions(planned.plan, planned.request.positions, run.out.later_positions)
        is_forced = ~layout.exact & ~layout.candidate
        question_pass = np.flatnonzero(is_forced) if planned.plan.needs("question_mass") else None
        stats = PrefillStats(
            mode=call.mode,
            tokens=layout.token_ids.size,
            ttft_s=ttft_s,
            host_s=ttft_s - run.run_s - call.timer.wait_s,
            load_s=run.load_s,
            compile_s=compile_s,
            hits=layout.hits,
            misses=layout.misses,
            exact=int(layout.exact.sum()),
            candidates=int(layout.candidate.sum()),
            forced=int(is_forced.sum()),
            recompute_ratio=planned.planner.recompute_ratio(layout, computed),
            flops=prefill_flops(self._model.config, computed, question_pass),
            peak_memory_bytes=run.peak_memory_bytes,
            executor=run.executor,
            damaged=len(call.lost),
            decision=planned.decision,
            wait_s=call.timer.wait_s,
            loaded=layout.loaded_chunks(call.tokenized),
            paused_s=run.paused_s,
        )
        logits = np.asarray(run.out.logits)
        return PrefillResult(logits, layout.token_ids, run.next_token, stats, run.out.cache, computed, planned.plan)


class Timer:
    """Measures a request's time, leaving out compilation and the oracle, which are not part of it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.wait_s = 0.0

    def elapsed_s(self) -> float:
        """Seconds since the timer was made, except while it was stopped."""
        return time.perf_counter() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out the time that the body takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began


@dataclass
class _Call:
    """A request's prefill, through all its attempts.

    Attributes:
        lost: keys of the chunks that are stored and cannot be used: they are computed, and stored anew.
        failed_tiers: those that a chunk could not be read from.
        lane: what runs it, once it has its turn.
        between: called where a long prefill pauses.
    """

    tokenized: TokenizedPrompt
    mode: str
    planner: Planner
    trace: Trace | None
    only_if_ready: bool = False
    between: Callable[[], object] | None = None
    timer: Timer = field(default_factory=Timer)
    lost: set[str] = field(default_factory=set)
    failed_tiers: set[str] = field(default_factory=set)
    lane: Lane = field(init=False)

    def wants_pauses(self, plan: Plan) -> bool:
        """Whether a plan had better pause: others want to go on, and it seems to take long."""
        return self.between is not None and self.lane.executors.is_long(plan)

    def pauses(self, plan: Plan, chunks: Sequence[PlacedChunk]) -> bool:
        """Whether a plan is to pause with these chunks: it had better, and need not wait for the compiler instead."""
        if not self.wants_pauses(plan):
            return False
        return not (self.only_if_ready and self.lane.executors.runs_whole_meanwhile(plan, chunks))

    def asked(self) -> dict[str, object]:
        """Returns what the request is, beside its chunks: the same on all hosts."""
        planner = self.planner
        return {
            "mode": self.mode,
            "blend": planner.blend,
            "check_layer": planner.check_layer,  # the model's may be what this host has measured
            "buckets": planner.buckets,
            "model": planner.config,
            "token_ids": self.tokenized.token_ids,
        }

    def trusts(self, tier: str) -> bool:
        """Whether chunks of a tier are loaded: after a failure, only from memory, so that there is only one."""
        return not self.failed_tiers or not (is_slow(tier) or tier in self.failed_tiers)


@dataclass(frozen=True)
class _Planned:
    """What an attempt runs; `planner` has the ratio that the controller chose, if it was asked."""

    planner: Planner
    layout: Layout
    plan: Plan
    request: Request
    decision: Decision | None
