"""What tests of the server share: a scheduler that says what it is told to, and a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

import cacheblend_jax as cb
from cacheblend_jax.engine.answer import AnswerToken
from cacheblend_jax.engine.prompt import tokenize_prompt
from cacheblend_jax.engine.results import PrefillStats
from cacheblend_jax.errors import QueueFull
from cacheblend_jax.serving import Bounds, ServingOptions, Tenants, bound_socket, make_app
from cacheblend_jax.serving.server import server_of
from cacheblend_jax.store import TenantStore

CHUNKS = ["Reyes took the nickname Cobalt. Ridge is new.", "Oslo is now home to Cobalt. Lima is home to Ridge."]
QUESTION = "In which city is the office of Reyes?"
# Some answers wait for the compiler, longer than the five seconds that httpx waits.
# To read the certificates that plain HTTP has no use for takes longer than most tests.
get, post = (functools.partial(ask, timeout=60, verify=False) for ask in (httpx.get, httpx.post))


@dataclass
class Counts:
    waiting: int = 0
    running: int = 0
    slots: int = 2


class ScriptedAnswer:
    """Says the scheduler's script; each token waits for the scheduler's gate."""

    def __init__(self, scheduler: ScriptedScheduler, stats: PrefillStats, most: int) -> None:
        self._scheduler, self._stats, self._most = scheduler, stats, most
        self.prefill_stats: PrefillStats | None = None
        self.finish_reason: str | None = None
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        raise AssertionError("a server iterates in its event loop")

    def result(self) -> Any:
        raise AssertionError("a server does not block")

    async def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        if self._scheduler.fails is not None:
            raise self._scheduler.fails
        self.prefill_stats = self._stats
        for number, text in enumerate(self._scheduler.script[: self._most]):  # its place is its id
            await asyncio.to_thread(self._scheduler.gate.wait)
            if self.cancelled.is_set():
                self.finish_reason = "cancelled"
                return
            yield number, text
        self.finish_reason = "length" if len(self._scheduler.script) > self._most else "stop"

    def when_readable(self, call: Callable[[], object]) -> None:
        threading.Thread(target=lambda: (self._scheduler.gate.wait(), call()), daemon=True).start()

    def token(self, number: int) -> AnswerToken:
        return self._scheduler.tokens[number]

    def cancel(self) -> None:
        with self._scheduler.counting:
            if not self.cancelled.is_set():
                self.cancelled.set()
                self._scheduler.stats.running -= 1


class ScriptedScheduler:
    """A scheduler without a device: it finds what the engine's store holds, and answers with its script."""

    def __init__(self, engine: cb.Engine, script: tuple[str, ...] = ("The ", "office ", "is in ", "Oslo", ".")) -> None:
        self.engine, self.script = engine, script
        self.stats, self.counting = Counts(), threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None
        self.is_full = self.is_closed = False
        self.submitted: list[dict[str, Any]] = []
        self.tokens = [AnswerToken(0.25, None)] * len(script)
        self.answers: queue.SimpleQueue[ScriptedAnswer] = queue.SimpleQueue()

    def submit(
        self,
        prompt,
        *,
        mode="blend",
        blend=None,
        max_new_tokens=256,
        sampling=None,
        stop_token_ids=None,
        logprobs=False,
    ):
        if self.is_full:
            raise QueueFull("64 requests wait already; try again later")
        config = self.engine.model.config
        tokenized = tokenize_prompt(
            prompt, self.engine.model.tokenizer, vocab_size=config.vocab_size, max_tokens=config.max_positions
        )
        how = {"prompt": prompt, "mode": mode, "blend": blend, "max_new_tokens": max_new_tokens, "sampling": sampling}
        self.submitted.append({**how, "logprobs": logprobs})
        loaded = tuple(each.is_stored for each in self.engine.look_up(prompt)) if mode != "full" else ()
        reused = sum(ids.size for ids, stored in zip(tokenized.chunks, loaded, strict=False) if stored)
        total = tokenized.token_ids.size
        counts = {"hits": sum(loaded), "misses": len(loaded) - sum(loaded), "exact": 0, "candidates": reused}
        times = {"ttft_s": 0.01, "host_s": 0.0, "load_s": 0.0, "compile_s": 0.0}
        rest = {"forced": total - reused, "recompute_ratio": 0.15, "flops": 0, "peak_memory_bytes": 0}
        all_loaded = loaded or (False,) * len(tokenized.chunks)
        stats = PrefillStats(mode=mode, tokens=total, **counts, **times, **rest, loaded=all_loaded)
        answer = ScriptedAnswer(self, stats, max_new_tokens)
        with self.counting:
            self.stats.running += 1
        self.answers.put(answer)
        return answer

    def close(self, timeout_s: float | None = None) -> None:
        self.is_closed = True


@dataclass
class Running:
    """A server in a thread."""

    url: str
    scheduler: Any
    engine: cb.Engine
    app: Any
    server: Any = None
    thread: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def holds_no_slot(self) -> bool:
        """Whether no answer is running before long: of a client that has gone, the thread that submits it ends it."""
        given_up_at = time.monotonic() + 30
        while self.scheduler.stats.running and time.monotonic() < given_up_at:
            time.sleep(1e-3)
        return self.scheduler.stats.running == 0

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def exchange(self, *pieces: bytes, half_close: bool = False) -> tuple[int, bytes]:
        """Sends bytes on a connection of their own; returns the status and the body of what comes back."""
        with socket.create_connection(self.address, timeout=300) as connection:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]) if head else 0), body

    def post(self, path: str, body: bytes, *headers: str, **options: bool) -> tuple[int, bytes]:
        """Posts a body as it is."""
        lines = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {len(body)}"]
        if not any(line.lower().startswith("content-type") for line in headers):
            lines.append("Content-Type: application/json")
        head = "\r\n".join([*lines, *headers, "", ""]).encode()
        return self.exchange(head, body, **options)

    def error(self, path: str, body: Any, *headers: str) -> tuple[int, dict[str, Any]]:
        """Posts what is to be refused; returns the status and the error object."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = self.post(path, raw, *headers)
        return status, json.loads(answer)["error"]


@contextlib.contextmanager
def running(
    scheduler: Any = None,
    *,
    engine: cb.Engine | None = None,
    tenants: Tenants | None = None,
    bounds: Bounds | None = None,
    model_name: str = "demo",
    **options: Any,
) -> Iterator[Running]:
    """Runs a server of the bundled model; the body may ask it."""
    if engine is None:
        store = TenantStore(cb.ChunkStore(), None if tenants is None else tenants.quotas)
        engine = cb.Engine(cb.load_model("demo"), store)
    scheduler = scheduler or ScriptedScheduler(engine)
    warm_up = options.pop("warm_up", None)
    bounds = bounds or Bounds()
    chosen = ServingOptions(model_name=model_name, bounds=bounds, **options)
    app = make_app(engine, scheduler, chosen, tenants, warm_up=warm_up)
    addresses: queue.SimpleQueue[str] = queue.SimpleQueue()
    server = server_of(app, bounds, chosen.stop_s, addresses.put)
    bound = bound_socket("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        yield Running(addresses.get(timeout=60), scheduler, engine, app, server, thread)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
