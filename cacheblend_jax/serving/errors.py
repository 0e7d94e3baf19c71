"""Errors as OpenAI's clients read them: a status, and an object with a message, a type, a code and a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacheblend_jax.errors import CacheBlendError, PromptTooLongError, QueueFull, SchedulerClosed, one_line

TOO_LONG = "context_length_exceeded"


class ApiError(Exception):
    """An answer that is an error. The message is for the client alone: it may hold what the client wrote.

    Args:
        status: of HTTP.
        message: names the value, what was expected, and what to do.
        kind: OpenAI's type: `invalid_request_error`, `rate_limit_error`, `server_error`, …
        code: for programs, and for the log.
        param: the field of the request.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        fields = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}


class AnswerFailedError(Exception):
    """An answer has failed: not for what its request says, which was checked before it was submitted."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request that makes no sense."""
    return ApiError(400, message, param=param, code=code)


def unsupported(message: str, param: str) -> ApiError:
    """Returns the error of a request for what the server cannot do."""
    return invalid(message, param, "unsupported_parameter")


def stopping() -> ApiError:
    """Returns the error of a request that comes after the last one that is answered."""
    return ApiError(503, "the server is ending; ask another one", kind="server_error", code="stopping")


def api_error(error: Exception) -> ApiError:
    """Returns what a client is told of an error; of one that nobody expected, nothing but that it was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        options: dict[str, Any] = {"kind": "rate_limit_error", "code": "queue_full", "headers": {"Retry-After": "1"}}
        return ApiError(429, one_line(error), **options)
    if isinstance(error, SchedulerClosed):
        return stopping()
    if isinstance(error, PromptTooLongError):
        return invalid(one_line(error), "messages", TOO_LONG)
    if isinstance(error, CacheBlendError):
        return invalid(one_line(error))
    return ApiError(500, "the server failed to answer; its log says why", kind="server_error", code="internal_error")
