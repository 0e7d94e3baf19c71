"""Answers requests: submits a prompt, and follows its tokens to the end, a stop string, or the client's leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.serving.errors import AnswerFailedError, ApiError
from cacheblend_jax.serving.requests import AnswerRequest
from cacheblend_jax.serving.scheduling import Answer
from cacheblend_jax.serving.service import Service
from cacheblend_jax.serving.stop_strings import StopStrings
from cacheblend_jax.serving.token_logprobs import ShownToken


@dataclass(frozen=True)
class Piece:
    """What an answer gains at a time: text, and the tokens whose text it is, where log-probabilities were asked for.

    Attributes:
        offset: characters of the answer before it.
    """

    text: str
    tokens: tuple[ShownToken, ...]
    offset: int


class RunningAnswer:
    """An answer on its way to a client.

    Attributes:
        request: what was asked for.
        tokenizer: the model's.
        num_tokens: of the answer, so far.
        finish_reason: `"stop"` or `"length"`, once it has ended.
    """

    def __init__(self, service: Service, request: AnswerRequest, answer: Answer, began: float) -> None:
        self.request, self._answer, self._metrics = request, answer, service.metrics
        self.tokenizer = service.engine.model.tokenizer
        self._tokens = aiter(answer)
        self._stops = StopStrings(request.stops)
        self._first: tuple[int, str] | None = None
        self._began, self._unshown, self._shown = began, list[ShownToken](), 0
        self.num_tokens = 0
        self.finish_reason: str | None = None

    @classmethod
    async def submitted(cls, service: Service, read: Callable[[], AnswerRequest]) -> RunningAnswer:
        """Reads a request and submits it, in a thread, and waits for the first token: what fails by then has a status.

        Raises:
            ApiError, CacheBlendError: the request makes no sense, or too many wait.
            AnswerFailedError: prefilling has failed.
        """
        began = time.perf_counter()

        def submit() -> RunningAnswer:
            request = read()
            answer = service.scheduler.submit(
                request.prompt,
                mode=request.mode,
                blend=request.blend,
                max_new_tokens=request.max_tokens,
                sampling=request.sampling,
                logprobs=request.logprobs is not None,
            )
            return cls(service, request, answer, began)

        def first_token(running: RunningAnswer, wake: Callable[[], None]) -> None:
            running._answer.when_readable(wake)

        running = await service.in_thread(submit, unwanted=cls.cancel, until=first_token)
        try:
            await running._begin()
        except BaseException:
            running.cancel()
            raise
        return running

    async def _begin(self) -> None:
        self._first = await self._next()
        stats, ttft_s = self.prefill, time.perf_counter() - self._began
        asyncio.get_running_loop().call_soon(self._count, stats, ttft_s)  # the first event does not wait for it

    def _count(self, stats: PrefillStats, ttft_s: float) -> None:
        self._metrics.ttft.labels(self.request.mode).observe(ttft_s)
        self._metrics.prefilled(stats, self._missed_tokens(stats))

    async def _next(self) -> tuple[int, str] | None:
        """Returns the next token; `None` after the last one.

        Raises:
            AnswerFailedError: prefilling or decoding has failed.
        """
        try:
            return await anext(self._tokens, None)
        except CacheBlendError as error:
            raise AnswerFailedError from error

    @property
    def prefill(self) -> PrefillStats:
        """What the prefill did.

        Raises:
            ApiError: the answer was ended before it ran.
        """
        if (stats := self._answer.prefill_stats) is None:
            raise ended()
        return stats

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields the answer as it comes, and frees its slot, however this ends.

        Raises:
            ApiError: the server ended the answer.
            AnswerFailedError: decoding has failed.
        """
        try:
            async for token in self._all_tokens():
                if shown := self._stops.add(token):
                    yield self._piece(shown)
                if self._stops.found:
                    break
            rest = self._stops.rest()
            if rest or (self._unshown and not self._stops.found):
                yield self._piece(rest)
            reason = "stop" if self._stops.found else self._answer.finish_reason
            if reason not in ("stop", "length"):
                raise ended()
            self.finish_reason = reason
        finally:
            self._metrics.answer_tokens.inc(self.num_tokens)
            self._answer.cancel()

    async def whole(self) -> Piece:
        """Returns the whole answer; errors as `pieces`."""
        async with aclosing(self.pieces()) as pieces:
            all_of_them = [piece async for piece in pieces]
        tokens = (token for piece in all_of_them for token in piece.tokens)
        return Piece("".join(piece.text for piece in all_of_them), tuple(tokens), 0)

    def _piece(self, text: str) -> Piece:
        piece = Piece(text, tuple(self._unshown), self._shown)
        self._unshown, self._shown = [], self._shown + len(text)
        return piece

    def cancel(self) -> None:
        """Ends the answer and frees its slot."""
        self._answer.cancel()

    async def _all_tokens(self) -> AsyncGenerator[str, None]:
        per_token, token = self._metrics.per_token.labels(self.request.mode), self._first
        while token is not None:
            token_id, text = token
            known = self._answer.token(self.num_tokens)
            if known.logprobs is not None:
                self._unshown.append(ShownToken(token_id, known.logprobs))
            if self.num_tokens:
                per_token.observe(known.seconds)
            self.num_tokens += 1
            yield text
            token = await self._next()

    def _missed_tokens(self, stats: PrefillStats) -> int:
        if stats.mode == "full":
            return 0
        loaded = zip(self.request.prompt.chunks, stats.loaded, strict=True)
        return sum(len(chunk) for chunk, is_loaded in loaded if not is_loaded)

    @property
    def usage(self) -> dict[str, Any]:
        """What it took, as OpenAI says it: cached tokens are those whose KV came from the store."""
        prompt_tokens = self.prefill.tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.prefill.reused},
        }

    @property
    def report(self) -> dict[str, Any]:
        """What was found and computed: the answer's field `cacheblend`."""
        stats = self.prefill
        return {
            "mode": stats.mode,
            "recompute_ratio": stats.recompute_ratio,
            "hits": stats.hits,
            "misses": stats.misses,
            "loaded": list(stats.loaded),
            "reused_tokens": stats.reused,
            "recomputed_tokens": round(stats.recompute_ratio * stats.candidates),
            "forced_tokens": stats.forced,
            "seed": self.request.sampling.seed,
        }


def ended() -> ApiError:
    """Returns the error of an answer that the server ended itself."""
    message = "the server ended the answer; send the request again"
    return ApiError(503, message, kind="server_error", code="cancelled", headers={"Retry-After": "1"})
