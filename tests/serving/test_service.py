"""What blocks runs in a thread, and wakes its event loop no more than once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cacheblend_jax.serving.service import Service


@pytest.fixture
def service():
    with ThreadPoolExecutor(1) as threads:
        yield SimpleNamespace(_threads=threads)


def test_who_waits_for_more_than_the_result_is_woken_by_that_alone(service):
    async def ask():
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        given = []

        def until(result, wake):
            given.extend([result, wake])
            loop.call_soon_threadsafe(ready.set)

        waiting = asyncio.ensure_future(Service.in_thread(service, lambda: 5, until=until))
        await ready.wait()
        await asyncio.wrap_future(service._threads.submit(int))  # the thread is done with the first
        await asyncio.sleep(0)
        assert not waiting.done()
        assert given[0] == 5
        given[1]()
        given[1]()  # twice: nothing more
        return await waiting

    assert asyncio.run(ask()) == 5


def test_work_that_fails_wakes_whoever_waits(service):
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Service.in_thread(service, lambda: 1 / 0, until=lambda result, wake: None))


def test_a_result_that_nobody_waits_for_any_more_is_given_up(service):
    given_up = []

    async def leave():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await Service.in_thread(service, lambda: 5, given_up.append, until=lambda result, wake: None)

    asyncio.run(leave())
    service._threads.submit(int).result()
    assert given_up == [5]
