"""A request's connection: reads its body within bounds, and ends the work for a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from cacheblend_jax.serving.errors import ApiError
from cacheblend_jax.serving.options import Bounds

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]
DRAINED = 16  # times the largest body: read and dropped, so that a client that sends more can read why it may not


class ClientGoneError(Exception):
    """The client has closed its connection: nobody waits for an answer."""


async def body_of(request: Request, bounds: Bounds) -> bytes:
    """Reads a request's body.

    Raises:
        ApiError: it is no JSON by its type, too large, or does not come in time.
        ClientGoneError: the client has gone.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        message = "the body must be JSON; send it with 'Content-Type: application/json'"
        raise ApiError(415, message, code="invalid_content_type")
    try:
        async with asyncio.timeout(bounds.body_s):
            return await _read(request, bounds.body_bytes)
    except TimeoutError:
        message = f"the body did not come within {bounds.body_s:g} s"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None


async def _read(request: Request, most: int) -> bytes:
    """Reads a body; of one that is too large, what it takes to let the client see the answer."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > DRAINED * most:
            break
        else:
            parts.clear()
    if size > most:
        message = f"the body has more than {most} bytes; send shorter texts"
        raise ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what `work` returns; cancels it where the client goes, or the server has to.

    It runs in the caller's task: the way from a first token to its client leads through no other one.

    Raises:
        ClientGoneError: the client has gone.
    """
    task, leaving = asyncio.current_task(), asyncio.ensure_future(_gone(receive))
    assert task is not None  # a coroutine runs in one
    is_working, has_gone, before = True, False, task.cancelling()

    def leave(left: asyncio.Future[None]) -> None:
        nonlocal has_gone
        if left.cancelled():
            return
        left.exception()  # whatever `receive` raised: there is no connection any more
        if is_working:
            has_gone = True
            task.cancel()

    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if has_gone and task.cancelling() <= before + 1:  # nobody else has cancelled it
            raise ClientGoneError from None
        raise
    finally:
        is_working = False
        leaving.cancel()
        if has_gone:
            task.uncancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
