"""Calls that compute chunks ahead: they run one at a time, tenants take turns, and nothing is done for who has left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from cacheblend_jax.engine.waiting import WaitingRequests
from cacheblend_jax.serving.errors import ApiError, stopping

WAITING = 16


@dataclass(frozen=True, eq=False)
class _Call:
    tenant: str
    work: Callable[[], Any]
    result: asyncio.Future[Any]


class PrecomputeCalls:
    """Runs calls in a thread of their own. To be used in one event loop, but for `close`.

    Args:
        waiting: how many calls may wait. Where so many do, a tenant with less than an equal share still has room.
    """

    def __init__(self, waiting: int = WAITING) -> None:
        self._most = waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cacheblend-precompute")
        self._waiting: WaitingRequests[_Call] = WaitingRequests(lambda call: call.tenant)
        self._is_running = False

    async def run(self, tenant: str, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns. Cancelled while it waits, it is not run.

        Raises:
            ApiError: too many calls wait, or the server is ending.
        """
        call = _Call(tenant, work, asyncio.get_running_loop().create_future())
        if not self._waiting.has_room_for(call, self._most):
            message = f"{len(self._waiting)} requests wait to compute chunks; try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full")
        self._waiting.add(call)
        self._start_next()
        try:
            return await call.result
        finally:
            self._waiting.remove(call)

    def close(self) -> None:
        """Waits for the call that runs."""
        self._thread.shutdown(cancel_futures=True)

    def _start_next(self) -> None:
        while self._waiting.has_next and not self._is_running:
            call = self._waiting.next()
            if call.result.done():  # cancelled, and its task has not run since
                continue
            try:
                running = asyncio.wrap_future(self._thread.submit(call.work))
            except RuntimeError:  # closed
                call.result.set_exception(stopping())
                continue
            self._is_running = True
            running.add_done_callback(partial(self._end, call))

    def _end(self, call: _Call, running: asyncio.Future[Any]) -> None:
        self._is_running = False
        error = stopping() if running.cancelled() else running.exception()
        if not call.result.done():  # as it is where nobody waits for it any more
            if error is None:
                call.result.set_result(running.result())
            else:
                call.result.set_exception(error)
        self._start_next()
