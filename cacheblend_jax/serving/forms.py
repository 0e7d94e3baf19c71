"""The two forms that answers have: of `/v1/chat/completions` and of `/v1/completions`, whole and as events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.serving.answers import Piece, RunningAnswer
from cacheblend_jax.serving.token_logprobs import chat_logprobs, completion_logprobs

COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Form:
    """How an endpoint's answers look.

    Attributes:
        prefix: of their ids.
        whole, part: what an answer, and one of its events, is called.
        is_chat: whether an answer is a message, or text.
    """

    prefix: str
    whole: str
    part: str
    is_chat: bool

    def choice(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str) -> dict[str, Any]:
        """Returns the whole answer's one choice."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, running: RunningAnswer, piece: Piece) -> dict[str, Any] | None:
        """Returns what a choice has of its tokens' log-probabilities; `None` where none were asked for."""
        alternatives = running.request.logprobs
        if alternatives is None:
            return None
        if self.is_chat:
            return chat_logprobs(piece.tokens, alternatives, running.tokenizer)
        return completion_logprobs(piece.tokens, alternatives, running.tokenizer, piece.offset)

    def delta(
        self,
        text: str | None,
        finish_reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """Returns an event's choice: text that the answer gains, or, without any, its end."""
        if self.is_chat:
            said: dict[str, Any] = {"delta": {} if text is None else {"content": text}}
            if first:
                said["delta"]["role"] = "assistant"
        else:
            said = {"text": text or ""}
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}


CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", True)
COMPLETION = Form("cmpl-", "text_completion", "text_completion", False)


def _head(form: Form, kind: str, model: str) -> dict[str, Any]:
    return {"id": form.prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": model}


async def whole_answer(form: Form, running: RunningAnswer, model: str) -> dict[str, Any]:
    """Returns an answer once it has ended; errors as `RunningAnswer.pieces`."""
    whole = await running.whole()
    choices = [form.choice(whole.text, form.logprobs(running, whole), running.finish_reason or "stop")]
    return {**_head(form, form.whole, model), "choices": choices, "usage": running.usage, "cacheblend": running.report}


async def answer_events(form: Form, running: RunningAnswer, model: str) -> AsyncGenerator[bytes, None]:
    """Yields an answer's events as it comes, those together that come together; errors as `RunningAnswer.pieces`."""
    head = _head(form, form.part, model)
    if running.request.include_usage:
        head["usage"] = None  # on all events but the last
    opening = event({**head, "choices": [form.delta("", first=True)]}) if form.is_chat else b""
    async with aclosing(running.pieces()) as pieces:
        async for piece in pieces:
            gained = form.delta(piece.text, logprobs=form.logprobs(running, piece))
            yield opening + event({**head, "choices": [gained]})
            opening = b""
    end = event({**head, "choices": [form.delta(None, running.finish_reason)], "cacheblend": running.report})
    if running.request.include_usage:
        end += event({**head, "choices": [], "usage": running.usage})
    yield opening + end + b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + COMPACT.encode(value).encode() + b"\n\n"
