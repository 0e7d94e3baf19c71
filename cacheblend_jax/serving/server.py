"""Runs the application on a port, with bounds on what connections may do before they are requests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.serving.options import Bounds

MAX_CONNECTIONS = 1000
MAX_HEAD_BYTES = 32 * 2**10


def protocol_with(head_s: float, write_s: float) -> type[H11Protocol]:
    """Returns the protocol that ends connections whose clients do not do their part.

    Args:
        head_s: seconds until the head of a connection's next request must have come, and, after an answer that needed
            no body, what is left of the one before.
        write_s: seconds until a client must have taken what fills the connection's buffer.
    """

    class BoundedProtocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            self._has_read()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            # A transport that is closed keeps its socket until the client has taken what is left.
            self._unread = self.loop.call_later(write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._has_read()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            is_asking = self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE
            if is_asking:
                self._stop_watching()
            elif self._waiting is None and not self.transport.is_closing():
                self._waiting = self.loop.call_later(head_s, self.transport.close)

        def _has_read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _stop_watching(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return BoundedProtocol


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that has an address, but does not listen yet: a server can be refused it before it loads.

    Args:
        port: 0: any that is free.

    Raises:
        CacheBlendError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only with the protocol does asyncio send at once: else an event waits until the one before is acknowledged, 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere another process could then bind the same port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError | OverflowError) -> CacheBlendError:
    reason = reason_and_remedy(error, "choose another host or port") if isinstance(error, OSError) else str(error)
    return CacheBlendError(f"cannot listen on {host} port {port}: {reason}")


def server_of(
    app: Starlette, bounds: Bounds, stop_s: float, announce: Callable[[str], object] | None = None
) -> uvicorn.Server:
    """Returns the server of an application; it takes no more, and finishes what runs, once it is told to end.

    Args:
        stop_s: seconds until what still runs then is ended.
        announce: called with each address, once the server listens.
    """
    config = uvicorn.Config(
        app,
        http=protocol_with(bounds.head_s, bounds.write_s),
        loop="asyncio",  # what connections may do was tried on this loop: under uvloop, requests were left waiting
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=max(1, round(stop_s)),
    )
    return AnnouncedServer(config, announce or (lambda address: None))


class AnnouncedServer(uvicorn.Server):
    """A server that says when it has begun to listen."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[str], object]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen.

        Raises:
            CacheBlendError: another process has begun to, at the same address.
        """
        addresses = [bound.getsockname()[:2] for bound in sockets or []]
        try:
            await super().startup(sockets)
        except OSError as error:
            host, port = addresses[0]
            raise _cannot_listen(host, port, error) from error
        for host, port in addresses:
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def run_server(
    app: Starlette,
    bound: socket.socket,
    *,
    bounds: Bounds | None = None,
    stop_s: float = 30.0,
    announce: Callable[[str], object] = print,
) -> None:
    """Serves an application until SIGTERM or SIGINT; see `server_of`.

    Args:
        bound: where to listen: see `bound_socket`.
        announce: called with each address, once the server listens.

    Raises:
        CacheBlendError: another process listens at the same address by now.
        KeyboardInterrupt: it was ended by SIGINT.
    """
    server = server_of(app, bounds or Bounds(), stop_s / 2, announce)
    # The server ends in order by itself, and then raises the signal again for whoever handled it before.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
