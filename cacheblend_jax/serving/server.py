"""Runs the application on a port, with bounds on what connections may do before they are requests."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.serving.options import Bounds

MAX_CONNECTIONS = 1000
MAX_HEAD_BYTES = 32 * 2**10  # of a request: what frames a body counts alike
INVALID = "Invalid HTTP request received."
UPGRADES = (b"connection", b"http2-settings", b"upgrade")


def protocol_with(head_s: float, write_s: float) -> type[HttpToolsProtocol]:
    """Returns the protocol that ends connections whose clients do not do their part, or send heads without an end.

    Args:
        head_s: seconds until the head of a connection's next request must have come, and, after an answer that needed
            no body, what is left of the one before.
        write_s: seconds until a client must have taken what fills the connection's buffer.
    """

    class BoundedProtocol(HttpToolsProtocol):
        _waiting: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _framing = 0  # bytes that came since a head, or a piece of a body, was complete

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
            self._unset_keepalive_if_required()
            self._framing += len(data)
            try:
                self._parse(data)
                if self._framing > MAX_HEAD_BYTES:
                    raise httptools.HttpParserError("a head without an end")
            except httptools.HttpParserError:
                self.logger.warning(INVALID)
                self.send_400_response(INVALID)
            self._watch()

        def _parse(self, data: bytes) -> None:
            """Parses what came. Where a request asks for another protocol, its head is read again as if it did not.

            The parser takes what follows such a head for that protocol. Clients on a JVM ask so for HTTP/2, and send
            their body all the same.
            """
            while data:
                try:
                    return self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as upgrade:
                    method, version = self.parser.get_method(), self.parser.get_http_version().encode()
                    if method == b"CONNECT":
                        raise httptools.HttpParserError("this is no proxy") from None
                    head = [b"%s %s HTTP/%s" % (method, self.url, version)]
                    head += [b"%s: %s" % header for header in self.headers if header[0] not in UPGRADES]
                    self.parser = httptools.HttpRequestParser(self)
                    data = b"\r\n".join([*head, b"", b""]) + data[upgrade.args[0] :]

        def on_headers_complete(self) -> None:
            self._framing = 0
            if not self.parser.should_upgrade():
                hosts = sum(name == b"host" for name, _ in self.headers)
                if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
                    raise httptools.HttpParserError("a request has one host")
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._framing = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
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
