"""Continuous batching: requests wait in order, are prefilled one at a time, and are decoded together in slots."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.answer import Answer
from cacheblend_jax.engine.generation import Decoding
from cacheblend_jax.engine.loading import submit_or_run
from cacheblend_jax.engine.prompt import Prompt, check_length
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.engine.scheduling import Prefills, SchedulerStats
from cacheblend_jax.engine.slot_batch import Block, Ending, SlotBatch
from cacheblend_jax.engine.waiting import WaitingRequests
from cacheblend_jax.errors import CacheBlendError, NotReadyError, QueueFull, SchedulerClosed, is_whole_number
from cacheblend_jax.model.decode import MOST_AT_ONCE
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.runtime.exit_hook import finished, flush_before_exit
from cacheblend_jax.runtime.programs import Prepared

logger = logging.getLogger(__name__)
PREPARING = 4  # requests that something is done for at a time, beside the scheduler's thread: compiling, mostly
BLOCK_S = 0.025  # that tokens are decoded for at a time: a prompt that comes meanwhile waits for the end
MOST_ASIDE = 6  # times that one request is set aside; then it waits in the thread, lest it wait for ever


@dataclass(eq=False)
class _Request:
    """A request on its way through the scheduler.

    Attributes:
        times_aside: how often it was set aside for something that had to be done first.
        logprobs: whether its tokens come with log-probabilities.
        compile_s: seconds of that which the compiler took.
        waited_s: seconds from its submission until it was prefilled, without those.
        num_tokens: of its answer, so far.
    """

    answer: Answer
    prompt: Prompt
    length: int
    mode: str
    blend: BlendConfig | str | None
    sampling: Sampling
    ending: Ending
    logprobs: bool = False
    submitted_at: float = field(default_factory=time.perf_counter)
    times_aside: int = 0
    compile_s: float = 0.0
    waited_s: float = 0.0
    num_tokens: int = 0


class _UnwantedError(Exception):
    """A prompt is being prefilled, and its answer was cancelled."""


class Scheduler:
    """Answers many requests at once: one thread prefills them in turn, and decodes all together.

    On a mesh with `data`, each group of devices has its slots, and prefills the requests that it puts there: as many at
    the same time as there are groups, where `slots` is a multiple of them.

    A step of decoding reads the weights once for all slots, so that eight answers take little longer than one. Greedy
    and sampled answers have the tokens that `engine.generate` gives each alone (in 16-bit floats up to roundings, which
    depend on how many rows are multiplied together).

    Tenants take turns, and each one's requests come in the order they came. After each prefill, or those of several
    groups, there is at least one step of decoding, and a prefill that takes longer than 100 ms pauses for one about as
    often, so that a new request delays running answers by no more than that, or by a layer (those of several groups, at
    the same time, don't pause). One that needs the compiler first lets others pass, and delays nobody; nor does an
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
        most = engine.model.config.max_positions
        limits = {"slots": (slots, 4096), "max_tokens": (max_tokens, most), "waiting": (waiting, 2**31)}
        for name, (value, largest) in (limits | {"steps": (steps, MOST_AT_ONCE)}).items():
            if not is_whole_number(value, least=1, below=largest + 1):
                raise CacheBlendError(f"{name} must be a whole number in [1, {largest}], got {value!r}")
        if engine.model.spans_hosts:
            raise CacheBlendError(
                "a scheduler decodes what has arrived, which differs between hosts, and the model is on several; use "
                "Engine.generate, or a replica of the model on each host"
            )
        self._engine, self._steps, self._most_waiting, self._pausing = engine, steps, waiting, pausing
        self._batch = SlotBatch(engine.model, engine.buckets, slots, max_tokens)
        self._changed = threading.Condition()  # guards what follows; the batch is the thread's, once it is warm
        self._waiting: WaitingRequests[_Request] = WaitingRequests(lambda request: request.prompt.tenant)
        self._running: dict[int, _Request] = {}  # by slot
        self._prefilling: list[_Request] = []
        self._step_s = deque[float](maxlen=4)  # of the last blocks; the shortest counts, which nothing held up
        self._counts: Counter[str] = Counter()  # by the names of `SchedulerStats`
        self._is_closed = self._is_warming = False
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="cacheblend-prepare")
        self._prefillers = ThreadPoolExecutor(self._batch.num_groups, thread_name_prefix="cacheblend-prefill")
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
        ids = Prompt(tokenized.prefix, tokenized.chunks, tokenized.suffix, tenant=tokenized.tenant)
        answer = Answer(self._engine.model.tokenizer, self._cancelled)
        with self._changed:
            if self._is_closed:
                raise SchedulerClosed("the scheduler is closed; make another")
            request = _Request(answer, ids, length, mode, blend, sampling or Sampling(), ending, logprobs)
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
            running = len(self._running) + len(self._prefilling)
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
            return [request.answer for request in (*self._waiting, *self._prefilling, *self._running.values())]

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
                self._prefill(self._next_requests())
                self._decode()
        except BaseException as error:  # whatever it is, nobody is to wait for ever
            logger.exception("the scheduler ends: its thread has failed")
            with self._changed:
                self._is_closed = True
                waiting = list(self._waiting)
                for request in waiting:
                    self._waiting.remove(request)
            self._fail_all(error, *waiting)

    def _waits_for_work(self) -> bool:
        """Waits until there is something to do; returns whether there ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_warming and (self._has_work or self._has_done_all))
            return self._has_work

    @property
    def _has_work(self) -> bool:
        return self._waiting.has_next or bool(self._running)

    @property
    def _has_done_all(self) -> bool:
        return self._is_closed and not self._waiting

    def _next_requests(self) -> dict[int, _Request]:
        """Takes the request whose turn it is, for a slot that is free: one for each group of devices that has such.

        Groups with fewer answers come first, since a step takes as long as the group that has the most.
        """
        with self._changed:
            self._drop_ended()
            group_of, busy = self._batch.group_of, Counter(map(self._batch.group_of, self._running))
            free = [slot for slot in range(self._batch.num_slots) if slot not in self._running]
            slots = {group_of(slot): slot for slot in reversed(free)}
            order = sorted(slots, key=lambda group: (busy[group], slots[group]))
            taken = {slots[group]: self._waiting.next() for group in order if self._waiting.has_next}
            self._prefilling = [*taken.values()]
            return taken

    def _drop_ended(self) -> None:
        self._running = {slot: each for slot, each in self._running.items() if not each.answer.has_ended}

    def _prefill(self, taken: dict[int, _Request]) -> None:
        """Prefills requests, each on the devices that have its slot; those of several groups at the same time."""
        if len(taken) == 1:
            ((slot, request),) = taken.items()
            self._begin(slot, request, lambda: self._prefilled(slot, request, partial(self._between_layers, request)))
            return
        running = {submit_or_run(self._prefillers, self._prefilled, *each): each for each in taken.items()}
        for future in as_completed(running):
            self._begin(*running[future], future.result)

    def _begin(self, slot: int, request: _Request, prefilled: Callable[[], PrefillResult]) -> None:
        """Hands the first token of a prefilled request out, and puts it into its slot unless it ends there."""
        try:
            out = prefilled()
            first = self._batch.first_token(out, request.sampling, with_logprobs=request.logprobs)
            took = {name: getattr(out.stats, name) + request.waited_s for name in ("ttft_s", "wait_s")}
            compile_s = out.stats.compile_s + request.compile_s
            request.answer.prefilled(replace(out.stats, **took, compile_s=compile_s))
            if self._hand_out(request, first):
                self._insert(slot, request, out, first.token_ids[0])
        except NotReadyError as needed:
            self._set_aside(request, needed.work)
        except _UnwantedError:
            pass
        except BaseException as error:  # this request's alone
            self._fail(request, error)
        finally:
            self._has_prefilled(request)

    def _has_prefilled(self, request: _Request) -> None:
        with self._changed:
            self._prefilling = [each for each in self._prefilling if each is not request]

    def _prefilled(self, slot: int, request: _Request, between: Callable[[], object] | None = None) -> PrefillResult:
        """Prefills a request's prompt, for a slot; calls `between` at its pauses, where answers run.

        Raises:
            NotReadyError: something must be done first, beside the answers that run.
        """
        request.waited_s = time.perf_counter() - request.submitted_at - request.compile_s
        only_if_ready = request.times_aside < MOST_ASIDE
        between = between if self._pausing and self._running else None
        work = self._batch.preparation(request.length, with_logprobs=request.logprobs)
        if only_if_ready and work is not None:
            raise NotReadyError("the programs of the slots are not compiled", work)
        group, asked = self._batch.group_of(slot), (request.prompt, request.mode)
        return self._engine.prefill(
            *asked, blend=request.blend, only_if_ready=only_if_ready, group=group, between=between
        )

    def _between_layers(self, request: _Request) -> None:
        """Gives each answer that runs a token, while a long prompt is being prefilled.

        Raises:
            _UnwantedError: nobody waits for the prompt's answer any more.
        """
        if request.answer.has_ended:
            raise _UnwantedError
        self._decode(most=1)

    def _set_aside(self, request: _Request, work: Callable[[], object]) -> None:
        """Has `work` done beside what this thread does, and the request taken after it."""
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

        with self._changed:
            self._has_prefilled(request)
            self._waiting.set_aside(request)
        try:
            self._preparing.submit(prepare)
        except RuntimeError:  # no more threads
            prepare()

    def _insert(self, slot: int, request: _Request, out: PrefillResult, token: int) -> None:
        try:
            self._batch.insert(slot, out, token, request.ending, request.sampling)
        except BaseException as error:  # the program may have taken the other answers' cache
            self._fail_all(error, request)
            return
        with self._changed:
            self._running[slot] = request

    def _decode(self, most: int = MOST_AT_ONCE) -> None:
        """Decodes the answers that run: one step where a request could be prefilled next, else several."""
        with self._changed:
            self._drop_ended()
            running = dict(self._running)
            is_wanted = self._waiting.has_next and len(running) < self._batch.num_slots
        if not running:
            return
        in_time = max(int(BLOCK_S / min(self._step_s, default=BLOCK_S)), 1)
        steps, began = min(most, in_time, 1 if is_wanted else self._steps), time.perf_counter()
        try:
            with_logprobs = any(request.logprobs for request in running.values())
            decoded = self._batch.decode(running, steps, with_logprobs=with_logprobs)
        except BaseException as error:
            self._fail_all(error)
            return
        done = max((len(block.token_ids) for block in decoded), default=0)  # fewer where all answers have ended
        self._step_s.append(max(time.perf_counter() - began, 1e-6) / max(done, 1))
        for slot, request in running.items():
            if not self._hand_out(request, decoded[slot]):
                with self._changed:
                    self._running.pop(slot, None)

    def _hand_out(self, request: _Request, block: Block) -> bool:
        """Gives an answer its next tokens; returns whether it goes on after them."""
        reason, token_ids = None, []
        for token in block.token_ids:
            request.num_tokens += 1
            reason = request.ending.reason(token, request.num_tokens)
            if reason != "stop":
                token_ids.append(token)
            if reason is not None:
                break
        logprobs = block.logprobs[: len(token_ids)] if request.logprobs else ()
        if token_ids and not request.answer.add(token_ids, logprobs):
            return False
        with self._changed:
            self._counts["tokens"] += len(token_ids)
        if reason is not None:
            self._count("answered", request.answer.finish(reason))
        return not request.answer.has_ended

    def _fail_all(self, error: BaseException, *others: _Request) -> None:
        with self._changed:
            running, self._running = [*self._running.values(), *others], {}
        for request in running:
            self._fail(request, error)

    def _fail(self, request: _Request, error: BaseException) -> None:
        logger.debug("a request failed", exc_info=error)
        self._count("failed", request.answer.fail(error))

    def _count(self, what: str, has_happened: bool) -> None:
        with self._changed:
            self._counts[what] += has_happened
