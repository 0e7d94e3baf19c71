"""Connections: what is written goes out at once, and work ends with its client."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from cacheblend_jax.serving.connection import ClientGoneError, while_connected
from cacheblend_jax.serving.server import bound_socket


def test_what_is_written_is_sent_at_once():
    async def is_sent_at_once() -> int:
        taken: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        bound = bound_socket("127.0.0.1", 0)
        async with await asyncio.start_server(lambda _, writer: taken.put(writer), sock=bound):
            _, client = await asyncio.open_connection(*bound.getsockname())
            writer = await taken.get()
            set_to = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.close()
            writer.close()
            return set_to

    assert asyncio.run(is_sent_at_once())


async def others_go_on() -> None:
    """Lets all others do what they can without waiting: none takes more turns of the event loop."""
    for _ in range(20):
        await asyncio.sleep(0)


class Client:
    """Its messages come when the test says; `has_ended` says how the work for it did."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self.has_ended = ""

    async def work(self, until: asyncio.Future[str]) -> str:
        try:
            self.has_ended = await until
            return self.has_ended
        except asyncio.CancelledError:
            self.has_ended = "cancelled"
            raise

    def leaves(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


def in_turns(*steps):
    """Runs work for a client, and each step once all others have done what they can; returns the client and the end."""

    async def run():
        client, until = Client(), asyncio.get_running_loop().create_future()
        asking = asyncio.ensure_future(while_connected(client.messages.get, client.work(until)))
        for step in steps:
            await others_go_on()
            step(client, until, asking)
        try:
            return client, await asking
        except asyncio.CancelledError as error:
            return client, error
        except ClientGoneError as error:
            return client, error

    return asyncio.run(run())


def test_work_ends_with_its_client():
    client, end = in_turns(lambda client, *_: client.leaves())
    assert (client.has_ended, type(end)) == ("cancelled", ClientGoneError)


def test_what_cancels_the_caller_is_no_client_that_goes():
    client, end = in_turns(lambda _, __, asking: asking.cancel())
    assert (client.has_ended, type(end)) == ("cancelled", asyncio.CancelledError)


def test_work_that_ends_otherwise_leaves_no_cancellation_behind():
    async def cancellations() -> int:
        client = Client()

        async def does_not_mind() -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()
            return "done"

        client.leaves()
        assert await while_connected(client.messages.get, does_not_mind()) == "done"
        return asyncio.current_task().cancelling()

    assert asyncio.run(cancellations()) == 0


@pytest.mark.parametrize("is_work_first", [True, False])
def test_a_client_that_goes_as_its_work_ends_cancels_nothing_later(is_work_first):
    async def ask_and_go_on():
        client, until = Client(), asyncio.get_running_loop().create_future()

        async def handle():
            with contextlib.suppress(ClientGoneError):
                await while_connected(client.messages.get, client.work(until))
            await others_go_on()
            return "went on"

        handling = asyncio.ensure_future(handle())
        await others_go_on()
        for step in (lambda: until.set_result("done"), client.leaves)[:: 1 if is_work_first else -1]:
            step()
        return await handling

    assert asyncio.run(ask_and_go_on()) == "went on"
