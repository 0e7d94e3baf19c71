"""Clients of a server that speaks OpenAI's protocol, which take little time themselves: they measure it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

PATH = "/v1/chat/completions"
ANSWERED, LAST_CHUNK = b"HTTP/1.1 200 ", b"0\r\n"  # how an answer begins, and how a body in chunks ends


@dataclass(frozen=True)
class Answered:
    """One request's answer: seconds from when it was due, its tokens, and its status (200: it was answered)."""

    ttft_s: float
    seconds: float
    tokens: int
    status: int


class Client:
    """Asks a server; each request has a connection of its own."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        self.address = host, int(port)

    async def ask(self, body: dict[str, Any], due: float | None = None) -> Answered:
        """Sends a request and reads its events to the end."""
        raw = json.dumps(body).encode()
        events = Events(time.perf_counter() if due is None else due)
        reader, writer = await asyncio.open_connection(*self.address, limit=2**22)
        try:
            writer.write(_head(PATH, len(raw), "close") + raw)
            while line := await reader.readline():
                events.take(line, time.perf_counter())
        finally:
            writer.close()
        return events.answered()

    async def post(self, path: str, body: dict[str, Any]) -> None:
        """Posts what has no events."""
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(_head(path, len(raw), "close") + raw)
        answer = await reader.read()
        writer.close()
        if b" 200 " not in answer[:20]:
            raise SystemExit(f"{path}: {answer.decode(errors='replace')}")


class LoneClient:
    """Asks for one answer after another over one connection, as OpenAI's client does, and takes no time to speak of.

    Args:
        address: the server's host and port.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = socket.create_connection(address)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._connection.makefile("rb")

    def ask(self, body: dict[str, Any]) -> Answered:
        """Sends a request and reads its events to the end.

        Raises:
            SystemExit: it is not answered.
        """
        raw, line, lines = json.dumps(body).encode(), b"", list[tuple[bytes, float]]()
        events = Events(time.perf_counter())
        self._connection.sendall(_head(PATH, len(raw), "keep-alive") + raw)
        for line in self._lines:
            lines.append((line, time.perf_counter()))
            if line == LAST_CHUNK or not lines[0][0].startswith(ANSWERED):
                break
        if line != LAST_CHUNK:
            raise SystemExit(f"{PATH}: {line.decode()}")
        self._lines.readline()  # what follows it is empty
        for line, came in lines:
            events.take(line, came)
        return events.answered()

    def close(self) -> None:
        """Ends the connection."""
        self._lines.close()
        self._connection.close()


class Events:
    """What comes of a request, line by line.

    Args:
        due: when it was due, by `time.perf_counter`.
    """

    def __init__(self, due: float) -> None:
        self._due, self._status, self._tokens, self._first_s = due, 0, 0, float("nan")

    def take(self, line: bytes, came: float) -> None:
        """Takes the next line, and when it came."""
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if np.isnan(self._first_s) and any(choice["delta"].get("content") for choice in event["choices"]):
                self._first_s = came - self._due
            if usage := event.get("usage"):
                self._tokens = usage["completion_tokens"]
        elif not self._status:
            self._status = int(line.split()[1])

    def answered(self) -> Answered:
        """Returns what has come by now."""
        seconds = time.perf_counter() - self._due
        return Answered(seconds if np.isnan(self._first_s) else self._first_s, seconds, self._tokens, self._status)


def _head(path: str, size: int, connection: str) -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n"
    return f"{lines}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
