"""Continuous batching: requests wait in order, are prefilled one or a few at a time, and decoded together in slots."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.answer import Answer
from cacheblend_jax.engine.generation import Decoding
from cacheblend_jax.engine.loading import submit_or_run
from cacheblend_jax.engine.pauses import LONGEST_S
from cacheblend_jax.engine.prompt import Prompt, check_length
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.engine.scheduled import ScheduledRequest, free_slot
from cacheblend_jax.engine.scheduling import Prefills, SchedulerStats, check_scheduling
from cacheblend_jax.engine.slot_batch import Block, Ending, SlotBatch
from cacheblend_jax.engine.waiting import WaitingRequests
from cacheblend_jax.errors import CacheBlendError, NotReadyError, QueueFull, SchedulerClosed
from cacheblend_jax.model.decode import MOST_AT_ONCE
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.runtime.exit_hook import finished, flush_before_exit
from cacheblend_jax.runtime.programs import Prepared

logger = logging.getLogger(__name__)
PREPARING = 4  # requests that something is done for at a time, beside the scheduler's thread: compiling, mostly
BLOCK_S = 0.025  # that tokens are decoded for at a time: a prompt that comes meanwhile waits for the end
READING_S = 0.0005  # that an event loop has for a first token: what follows would keep it from the interpreter
MOST_ASIDE = 6  # times that one request is set aside; then it waits in the thread, lest it wait for ever


class _UnwantedError(Exception):
    """A prompt is being prefilled, and its answer was cancelled."""


class Scheduler:
    """Answers many requests at once: they are prefilled in turn, and decoded together.

    On a mesh with `data`, each group of devices has its slots, and prefills the requests that it puts there: as many at
    the same time as there are groups, where `slots` is a multiple of them. A CPU with several cores prefills two.

    A step of decoding reads the weights once for all slots that it decodes (on a CPU, half of them where the weights
    are small), so that eight answers take little longer than one. Greedy and sampled answers have the tokens that
    `engine.generate` gives each alone (in 16-bit floats up to roundings, which depend on how many rows are multiplied
    together).

    Tenants take turns, and each one's requests come in the order they came. After each prefill, or those of several
    groups, there is at least one step of decoding, and a prefill that takes longer than 100 ms pauses for one about as
    often, so that a new request delays running answers by no more than that, or by a layer, also while it waits for
    stored KV (those of several groups, at the same time, don't pause; nor does one of up to half a second while only
    its pauses need the compiler). One that needs it to run at all lets others pass, and delays nobody; nor does an
    answer that nobody reads. The engine's own methods may be used beside it.

    Args:
        slots: how many answers are decoded together.
        max_tokens: a slot's room for prompt and answer, at most the model's maximum: an answer ends where it is full.
            Slots take the memory of so many tokens' KV each.
        waiting: how many requests may wait; more are refused.
        steps: how many tokens are decoded, at most 64, before they are handed out and a waiting request gets a free
            slot; fewer where so many take longer than 25 ms.
        pausing: whether long prefills pause. Without, each one keeps running answers waiting to its end, but all
            requests together take less: more answers are decoded at a time.

    Raises:
        CacheBlendError: a number is out of its range.
    """

    def __init__(
        self,
        engine: Prefills,
        *,
        slots: int = 8,
        max_tokens: int = 2048,
        waiting: int = 64,
        steps: int = 8,
        pausing: bool = True,
    ) -> None:
        check_scheduling(engine.model, slots=slots, max_tokens=max_tokens, waiting=waiting, steps=steps)
        self._engine, self._steps, self._most_waiting, self._pausing = engine, steps, waiting, pausing
        self._batch = SlotBatch(engine.model, engine.buckets, slots, max_tokens, engine.lanes)
        self._driving = threading.Lock()  # held by the thread that uses the batch, once it is warm
        self._changed = threading.Condition()  # guards what follows; taken after the lock above, where both are
        self._waiting: WaitingRequests[ScheduledRequest] = WaitingRequests(lambda request: request.prompt.tenant)
        self._running: dict[int, ScheduledRequest] = {}  # by slot
        self._prefilling: dict[int, ScheduledRequest] = {}  # by the slot that they will have
        self._has_prefill_ended = False  # since the thread has looked last
        self._step_s = deque[float](maxlen=4)  # of the last blocks; the shortest counts, which nothing held up
        self._num_steps = 0
        self._counts: Counter[str] = Counter()  # by the names of `SchedulerStats`
        self._is_closed = self._is_warming = False
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="cacheblend-prepare")
        most_at_once = self._batch.num_groups * engine.lanes
        self._prefillers = ThreadPoolExecutor(most_at_once, thread_name_prefix="cacheblend-prefill")
        self._thread = threading.Thread(target=self._work, name="cacheblend-scheduler", daemon=False)
        self._thread.start()
        flush_before_exit(self)

    def submit(
        self,
        prompt: Prompt,
        *,
        mode: str = "blend",
        blend: BlendConfig | str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop_token_ids: Collection[int] | None = None,
        logprobs: bool = False,
    ) -> Answer:
        """Queues a request, whose arguments are those of `Engine.generate`, and returns its answer to be.

        Args:
            logprobs: whether log-probabilities come with each token (`Answer.token`). Decoding takes longer with them,
                for all answers that run at the time.

        Raises:
            QueueFull: as many requests wait as may.
            PromptError: the prompt is invalid or too long for a slot, or the mode is unknown.
            SchedulerClosed: it takes no more.
            CacheBlendError: another argument is invalid.
        """
        Decoding(max_new_tokens, sampling, stop_token_ids, None)
        tokenized = self._engine.check(prompt, mode, blend)
        length, capacity = tokenized.token_ids.size, self._batch.capacity
        check_length(length, capacity, "the prompt", taker="a slot of the scheduler (max_tokens)")
        stops = self._engine.model.stop_token_ids if stop_token_ids is None else stop_token_ids
        ending = Ending(frozenset(stops), min(max_new_tokens, capacity - length + 1))
        answer = Answer(self._engine.model.tokenizer, self._cancelled)
        with self._changed:
            if self._is_closed:
                raise SchedulerClosed("the scheduler is closed; make another")
            request = ScheduledRequest(answer, tokenized, length, mode, blend, sampling or Sampling(), ending, logprobs)
            if not self._waiting.has_room_for(request, self._most_waiting):
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later, or raise `waiting`")
            self._waiting.add(request)
            self._changed.notify()
        return answer

    def warmup(self) -> None:
        """Compiles what inserts and decodes, and allocates the slots; `Engine.warmup` compiles what prefills.

        Requests that are submitted meanwhile wait for its end.

        Raises:
            CacheBlendError: requests have been submitted before.
        """
        with self._changed:
            if self._waiting or self._running or self._prefilling or self._is_warming or self._is_closed:
                raise CacheBlendError("warm the scheduler up before the first request")
            self._is_warming = True  # the batch is the caller's until then
        try:
            self._batch.warm_up()
        finally:
            with self._changed:
                self._is_warming = False
                self._changed.notify()

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot of the counts."""
        with self._changed:
            running = sum(not each.answer.has_ended for each in (*self._running.values(), *self._prefilling.values()))
            return SchedulerStats(len(self._waiting), running, self._batch.num_slots, **self._counts)

    def close(self, timeout_s: float | None = None) -> None:
        """Answers what was submitted, and accepts no more; ends the thread. What a timeout leaves is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            for answer in self._unfinished():
                answer.cancel()
            self._thread.join()
        self._prefillers.shutdown()
        self._preparing.shutdown(wait=False)
        self._batch.close()
        finished(self)

    def flush(self) -> None:
        """Cancels what is unfinished: the process ends."""
        self.close(timeout_s=0)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.close(timeout_s=None if kind is None else 0)

    def _unfinished(self) -> list[Answer]:
        with self._changed:
            return [request.answer for request in (*self._waiting, *self._prefilling.values(), *self._running.values())]

    def _cancelled(self, answer: Answer) -> None:
        """Forgets a request that waits; the thread frees the slot of one that runs."""
        with self._changed:
            self._counts["cancelled"] += 1
            for request in [each for each in self._waiting if each.answer is answer]:
                self._waiting.remove(request)
            self._changed.notify()

    # What follows runs in the scheduler's thread.

    def _work(self) -> None:
        try:
            while self._waits_for_work():
                for slot, request in self._next_requests().items():
                    submit_or_run(self._prefillers, self._prefill, slot, request)
                self._decode(since=self._wait_for_prefills())
        except BaseException as error:  # whatever it is, nobody is to wait for ever
            logger.exception("the scheduler ends: its thread has failed")
            with self._changed:
                self._is_closed = True
            self._prefillers.shutdown()  # what has begun comes to its end first, or is set aside
            with self._changed:
                waiting = list(self._waiting)
                for request in waiting:
                    self._waiting.remove(request)
            self._fail_all(error, *waiting)

    def _waits_for_work(self) -> bool:
        """Waits until there is something to do; returns whether there ever will be."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._is_warming and (self._has_work or (self._is_closed and not self._waiting))
            )
            return self._has_work

    @property
    def _has_work(self) -> bool:
        return self._waiting.has_next or bool(self._running or self._prefilling)

    def _next_requests(self) -> dict[int, ScheduledRequest]:
        """Takes the requests whose turn it is, each for a slot that is free, as many as can be prefilled."""
        taken = {}
        with self._changed:
            self._drop_ended()
            while (slot := self._next_slot()) is not None:
                taken[slot] = self._prefilling[slot] = self._waiting.next()
                taken[slot].pauses = self._pausing and bool(self._running) and self._batch.num_groups == 1
        return taken

    def _next_slot(self) -> int | None:
        """Returns the slot for the next request that waits; `None` while there is no such request or slot."""
        if not self._waiting.has_next:
            return None
        batch, taken = self._batch, {"running": self._running, "prefilling": self._prefilling}
        return free_slot(batch.num_slots, batch.group_of, batch.part_of, self._engine.lanes, **taken)

    def _drop_ended(self) -> None:
        self._running = {slot: each for slot, each in self._running.items() if not each.answer.has_ended}

    def _wait_for_prefills(self) -> int | None:
        """Waits for a prefill to end, if answers are to wait for one; a free lane's next request may be taken, too.

        Where several groups prefill, for all of them: no program for all devices may come between theirs. Else
        `LONGEST_S` at most, unless a prefill pauses, which one that waits for stored KV does not: then it returns how
        many steps there were before.
        """
        with self._changed:
            num_steps = self._num_steps
            patience_s = LONGEST_S if self._pausing and self._running and self._batch.num_groups == 1 else None
            while not self._changed.wait_for(lambda: not self._prefilling or self._may_go_on, patience_s):
                if self._num_steps == num_steps:
                    return num_steps
                num_steps = self._num_steps  # a prefill has paused
            self._has_prefill_ended = False
            return None

    @property
    def _may_go_on(self) -> bool:
        if self._batch.num_groups > 1:
            return False
        self._drop_ended()
        if self._has_prefill_ended or self._next_slot() is not None:
            return True
        return self._pausing and bool(self._running) and {each.pauses for each in self._wanted} != {True}

    @property
    def _wanted(self) -> list[ScheduledRequest]:
        """The requests that are prefilled and were not cancelled: those that others wait for."""
        return [request for request in self._prefilling.values() if not request.answer.has_ended]

    # And this in those that prefill.

    def _prefill(self, slot: int, request: ScheduledRequest) -> None:
        """Prefills a request, hands its first token out, and puts it into its slot unless it ends there."""
        needed: NotReadyError | None = None
        try:
            out = self._prefilled(slot, request)
            first = self._batch.first_token(out, request.sampling, with_logprobs=request.logprobs)
            took = {name: getattr(out.stats, name) + request.waited_s for name in ("ttft_s", "wait_s")}
            compile_s = out.stats.compile_s + request.compile_s
            request.answer.prefilled(replace(out.stats, **took, compile_s=compile_s))
            if self._hand_out(request, first, READING_S):
                self._insert(slot, request, out, first.token_ids[0])
        except NotReadyError as error:
            needed = error
        except _UnwantedError:
            pass
        except BaseException as error:  # this request's alone
            self._fail(request, error)
        with self._changed:
            if self._prefilling.get(slot) is request:  # else it is in the slot, or was
                self._end_prefill(slot)
            if needed is not None:
                self._waiting.set_aside(request)
        if needed is not None:
            self._do_beside(request, needed.work)

    def _prefilled(self, slot: int, request: ScheduledRequest) -> PrefillResult:
        """Prefills a request's prompt, for a slot.

        Raises:
            NotReadyError: something must be done first, beside the answers that run.
        """
        request.waited_s = time.perf_counter() - request.submitted_at - request.compile_s
        only_if_ready = request.times_aside < MOST_ASIDE
        work = self._batch.preparation(request.length, with_logprobs=request.logprobs)
        if only_if_ready and work is not None:
            raise NotReadyError("the programs of the slots are not compiled", work)

        num_steps = self._num_steps

        def between() -> None:
            """Gives each answer that runs a token, unless another lane's pause has, since this one's last."""
            nonlocal num_steps
            if request.answer.has_ended:
                raise _UnwantedError
            if self._num_steps == num_steps:
                self._decode(most=1, since=num_steps)
            num_steps = self._num_steps

        return self._engine.prefill(
            request.prompt,
            request.mode,
            blend=request.blend,
            only_if_ready=only_if_ready,
            group=self._batch.group_of(slot),
            between=between if request.pauses else None,
        )

    def _do_beside(self, request: ScheduledRequest, work: Callable[[], object]) -> None:
        """Has `work` done beside prefilling and decoding, and the request, which is set aside, taken after it."""
        request.times_aside += 1

        def prepare() -> None:
            try:
                done = work()
                request.compile_s += done.compile_s if isinstance(done, Prepared) else 0.0
            except BaseException as error:  # this request's alone
                self._fail(request, error)
            with self._changed:
                if request.answer.has_ended:
                    self._waiting.remove(request)
                else:
                    self._waiting.put_back(request)
                self._changed.notify()

        try:
            self._preparing.submit(prepare)
        except RuntimeError:  # no more threads
            prepare()

    def _insert(self, slot: int, request: ScheduledRequest, out: PrefillResult, token: int) -> None:
        with self._driving:
            try:
                self._batch.insert(slot, out, token, request.ending, request.sampling)
            except BaseException as error:  # the program may have taken the other answers' cache
                self._fail_all(error, request)
                return
            with self._changed:
                self._running[slot] = self._end_prefill(slot)

    def _end_prefill(self, slot: int) -> ScheduledRequest:
        """Takes a request from those that are prefilled, and says so in the same step. The caller holds the lock."""
        self._has_prefill_ended = True
        self._changed.notify_all()
        return self._prefilling.pop(slot)

    # And this in either.

    def _decode(self, most: int = MOST_AT_ONCE, since: int | None = None) -> None:
        """Decodes the answers that run: one step where a request is prefilled meanwhile, or could be, else several.

        None where there were `since` steps when this became due, and another thread has taken one meanwhile.
        """
        with self._driving:
            if since not in (None, self._num_steps):
                return
            with self._changed:
                self._drop_ended()
                running = dict(self._running)
                steps = 1 if self._wanted or self._next_slot() is not None else self._steps
            if not running:
                return
            in_time = max(int(BLOCK_S / min(self._step_s, default=BLOCK_S)), 1)
            steps, began = min(most, in_time, steps), time.perf_counter()
            try:
                with_logprobs = any(request.logprobs for request in running.values())
                decoded = self._batch.decode(running, steps, with_logprobs=with_logprobs)
            except BaseException as error:
                self._fail_all(error)
                return
            done = max((len(block.token_ids) for block in decoded), default=0)  # fewer where all answers have ended
            self._num_steps += done
            self._step_s.append(max(time.perf_counter() - began, 1e-6) / max(done, 1))
            for slot, request in running.items():
                if not self._hand_out(request, decoded[slot]):
                    with self._changed:
                        self._running.pop(slot, None)
                        self._changed.notify()  # in a pause, a free lane's next request may have waited for the slot

    def _hand_out(self, request: ScheduledRequest, block: Block, reading_s: float = 0.0) -> bool:
        """Gives an answer its next tokens, and so many seconds to be read; returns whether it goes on after them."""
        token_ids, reason = request.take(block)
        logprobs = block.logprobs[: len(token_ids)] if request.logprobs else ()
        if token_ids and not request.answer.add(token_ids, logprobs):
            return False
        if reading_s:
            request.answer.let_read(reading_s)
        with self._changed:  # who reads the end finds it counted
            self._counts["tokens"] += len(token_ids)
            if reason is not None:
                self._counts["answered"] += request.answer.finish(reason)
        return not request.answer.has_ended

    def _fail_all(self, error: BaseException, *others: ScheduledRequest) -> None:
        with self._changed:
            running, self._running = [*self._running.values(), *others], {}
        for request in running:
            self._fail(request, error)

    def _fail(self, request: ScheduledRequest, error: BaseException) -> None:
        logger.debug("a request failed", exc_info=error)
        with self._changed:
            self._counts["failed"] += request.answer.fail(error)
