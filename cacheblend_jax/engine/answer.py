"""An answer that a scheduler is still working on: its tokens as they come, in a thread or on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cacheblend_jax.engine.growing_text import GrowingText
from cacheblend_jax.engine.results import GenerateStats, Generation, PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.logprobs import TokenLogprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerToken:
    """What is known of an answer's token.

    Attributes:
        seconds: since the one before it, or, of the first, since the request. Of tokens that were decoded together,
            each has an equal share.
        logprobs: where they were asked for.
    """

    seconds: float
    logprobs: TokenLogprobs | None


class Answer:
    """What `Scheduler.submit` returns: an iterator over `(token id, text that it adds)`, also for `async for`.

    Each token comes once, to whoever asks next. A character may span tokens: its text comes with the token that
    completes it. Nothing waits for a reader: tokens are kept until they are read, at most as many as the answer may
    have. Safe to use from several threads.

    Args:
        tokenizer: of the model; `None`: tokens have no text.
        on_cancel: called, once, by the first `cancel` of an answer that has not ended.
    """

    def __init__(self, tokenizer: Any | None, on_cancel: Callable[[Answer], None]) -> None:
        self._on_cancel = on_cancel
        self._changed = threading.Condition()  # guards what follows
        self._token_ids: list[int] = []
        self._tokens: list[AnswerToken] = []
        self._texts: list[str] = []
        self._growing_text = GrowingText(tokenizer)
        self._num_read = 0
        self._has_woken = False  # somebody, when something came last
        self._sleepers: list[Callable[[], object]] = []
        self._prefill_stats: PrefillStats | None = None
        self._finish_reason: str | None = None
        self._error: BaseException | None = None
        self._first_at = self._last_at = time.perf_counter()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        with self._changed:
            self._changed.wait_for(self._is_readable)
            read = self._read()
        if read is None:
            raise StopIteration
        return read

    def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        return self

    async def __anext__(self) -> tuple[int, str]:
        while True:
            with self._changed:
                if self._is_readable():
                    read = self._read()
                    break
            loop = asyncio.get_running_loop()
            awake = loop.create_future()
            self.when_readable(partial(wake, loop, awake))
            await awake
        if read is None:
            raise StopAsyncIteration
        return read

    def when_readable(self, call: Callable[[], object]) -> None:
        """Calls `call` once there is a token that was not read, or the end: at once, or in the thread that brings it.

        It must not take long, nor use the answer: the thread has tokens to decode. What it raises there is logged.
        """
        with self._changed:
            if not self._is_readable():
                self._sleepers.append(call)
                return
        call()

    def cancel(self) -> None:
        """Ends the answer where it is, and frees its slot; does nothing to one that has ended."""
        if self._end("cancelled"):
            self._on_cancel(self)

    def result(self) -> Generation:
        """Waits for the end and returns the whole answer; one that was cancelled has the tokens until then.

        Raises:
            CacheBlendError: it was cancelled before its prefill was done.
            Exception: what its prefill, or decoding, has raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended)
            if self._error is not None:
                raise self._error
            if self._prefill_stats is None:
                raise CacheBlendError("the answer was cancelled before its prefill was done; submit the prompt again")
            decoded = max(len(self._token_ids) - 1, 0)
            seconds = (self._last_at - self._first_at) / decoded if decoded else 0.0
            stats = GenerateStats(self._prefill_stats, decoded, seconds, self._finish_reason or "")
            return Generation(self._text_to_the_end(), list(self._token_ids), stats)

    @property
    def prefill_stats(self) -> PrefillStats | None:
        """Statistics of the prefill, once it is done; waiting for a slot counts as waiting (`wait_s`)."""
        return self._prefill_stats

    @property
    def finish_reason(self) -> str | None:
        """Why the answer has ended: `"stop"`, `"length"` or `"cancelled"`; `None` before, and after errors."""
        return self._finish_reason

    def token(self, number: int) -> AnswerToken:
        """Returns what is known of a token that has come, counted from 0."""
        return self._tokens[number]

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens come."""
        return self._has_ended

    def prefilled(self, stats: PrefillStats) -> None:
        """Takes the prefill's statistics (the scheduler's to call, as the methods below)."""
        self._prefill_stats = stats

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> bool:
        """Takes the next tokens, which were decoded together, unless it has ended; returns whether it has not.

        Args:
            logprobs: of each, or none.
        """
        with self._changed:
            if self._has_ended:
                return False
            before, self._last_at = self._last_at, time.perf_counter()
            if not self._token_ids:
                self._first_at = self._last_at
            seconds = (self._last_at - before) / len(token_ids)
            self._tokens += [AnswerToken(seconds, logprobs[at] if logprobs else None) for at in range(len(token_ids))]
            self._token_ids += token_ids
            self._wake()
            return True

    def let_read(self, seconds: float) -> None:
        """Waits for an event loop that the first token has woken to read it, for so long at most."""
        with self._changed:
            if self._has_woken:
                self._changed.wait_for(lambda: self._num_read > 0 or self._has_ended, seconds)

    def finish(self, reason: str) -> bool:
        """Ends the answer, unless it has ended; returns whether it had not."""
        return self._end(reason)

    def fail(self, error: BaseException) -> bool:
        """As `finish`, but readers get the error after the tokens that they have not read."""
        return self._end(None, error)

    @property
    def _has_ended(self) -> bool:
        return self._finish_reason is not None or self._error is not None

    def _end(self, reason: str | None, error: BaseException | None = None) -> bool:
        with self._changed:
            if self._has_ended:
                return False
            self._finish_reason, self._error = reason, error
            self._wake()
            return True

    def _wake(self) -> None:
        self._changed.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        self._has_woken = bool(sleepers)
        for call in sleepers:
            try:
                call()
            except Exception:  # this thread has other answers to go on with
                logger.exception("what an answer was to wake failed")

    def _is_readable(self) -> bool:
        return self._has_ended or self._num_read < len(self._token_ids)

    def _read(self) -> tuple[int, str] | None:
        """Returns the next unread token with its text; `None` after the last, and after a cancellation."""
        if self._finish_reason == "cancelled" or self._num_read == len(self._token_ids):
            if self._error is not None:
                raise self._error
            return None
        self._num_read += 1
        if self._num_read == 1:
            self._changed.notify_all()  # `let_read`
        return self._token_ids[self._num_read - 1], self._text_of(self._num_read - 1)

    def _text_of(self, index: int) -> str:
        """Returns what a token adds. Text is made by those who read: the scheduler's thread has tokens to decode."""
        while len(self._texts) <= index:
            self._texts.append(self._growing_text.add(self._token_ids[len(self._texts)]))
        return self._texts[index]

    def _text_to_the_end(self) -> str:
        if self._token_ids:
            self._text_of(len(self._token_ids) - 1)
        return "".join(self._texts)


def wake(loop: asyncio.AbstractEventLoop, sleeper: asyncio.Future[None]) -> None:
    """Has whoever waits for a future of an event loop go on, from any thread; does nothing where the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, sleeper)


def _settle(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
