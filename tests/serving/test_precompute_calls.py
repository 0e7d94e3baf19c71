"""Calls that compute chunks ahead: no tenant keeps another's out, and nothing is computed for who has left."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from cacheblend_jax.serving.errors import ApiError
from cacheblend_jax.serving.precompute_calls import PrecomputeCalls


class Calls:
    """Calls of which the first, of ada's, runs until `go_on`; `ran` says which have run."""

    def __init__(self, waiting: int) -> None:
        self.calls, self.gate, self.ran = PrecomputeCalls(waiting), threading.Event(), []

    def ask(self, tenant: str, name: str) -> asyncio.Task[str]:
        def work() -> str:
            assert self.gate.wait(60)
            self.ran.append(name)
            return name

        return asyncio.create_task(self.calls.run(tenant, work))


@contextlib.asynccontextmanager
async def calls_of_ada(waiting: int):
    calls = Calls(waiting)
    asked = [calls.ask("ada", str(number)) for number in range(waiting + 1)]
    await asyncio.sleep(0)
    try:
        yield calls, asked
    finally:
        calls.gate.set()
        calls.calls.close()


async def status(call: asyncio.Task[str]) -> str | int:
    try:
        return await call
    except ApiError as error:
        return error.status


def test_tenants_take_turns_and_none_fills_the_queue():
    async def asked():
        async with calls_of_ada(2) as (calls, of_ada):
            refused, of_bob = calls.ask("ada", "more"), calls.ask("bob", "bob")
            assert await status(refused) == 429
            calls.gate.set()
            assert [await each for each in (*of_ada, of_bob)] == ["0", "1", "2", "bob"]
            return calls.ran

    assert asyncio.run(asked()) == ["0", "1", "bob", "2"]


def test_what_waits_for_a_client_that_has_left_is_not_computed():
    async def asked():
        async with calls_of_ada(2) as (calls, (running, waiting, last)):
            for call in (running, waiting):
                call.cancel()
            await asyncio.sleep(0)
            more = calls.ask("ada", "more")  # there is room again
            calls.gate.set()
            assert (await last, await more) == ("2", "more")
            return calls.ran

    assert asyncio.run(asked()) == ["0", "2", "more"]  # what ran when its client left was finished


def test_a_call_that_fails_says_so_and_the_next_one_runs():
    async def asked():
        calls = PrecomputeCalls()
        with pytest.raises(ZeroDivisionError):
            await calls.run("ada", lambda: 1 // 0)
        assert await calls.run("ada", lambda: 1) == 1
        calls.close()
        with pytest.raises(ApiError, match="is ending"):
            await calls.run("ada", lambda: 1)

    asyncio.run(asked())
