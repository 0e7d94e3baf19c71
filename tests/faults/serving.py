"""A server that is asked without end while clients leave, files are damaged, and it is closed and opened again."""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_cases import Running, running

import cacheblend_jax as cb
from cacheblend_jax.serving import ServingOptions
from cacheblend_jax.serving.requests import AnswerRequest, RequestReader
from cacheblend_jax.store import TenantStore
from faults import require
from faults.directory import flip

PATH = "/v1/chat/completions"
AT_ONCE = 4  # requests of a group
TEXTS = [f"{name} took the nickname {nick}. {city} is home to {nick}. " * 2 for name, nick, city in (
    ("Reyes", "Cobalt", "Oslo"), ("Novak", "Ridge", "Lima"), ("Haas", "Ember", "Quito"), ("Lund", "Flint", "Cairo"),
)]  # fmt: skip
QUESTIONS = ["In which city is the office of Reyes?", "In which city is the office of Lund?"]
MODES = ("full", "prefix", "reuse", "blend")
HOST_BYTES = 100_000  # of few chunks: others are read from the disk, where they may be damaged
GROWTH, FEW = 0.05, 2  # the system's own pools start a thread or two late
SETTLING_S = 30
PATIENCE_S = 600  # the first requests wait for the compiler


@dataclass(frozen=True)
class Resources:
    """What the process holds between two servers, and how many programs were compiled until then."""

    rss_bytes: int
    threads: int
    descriptors: int
    programs: int

    @classmethod
    def now(cls, programs: int) -> Resources:
        """Counts them, after what nobody holds is gone."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), *counts, programs)


def requests(
    directory: Path,
    rounds: Iterable[int],
    seed: int = 0,
    *,
    modes: Sequence[str] = MODES,
    temperatures: Sequence[float] = (0, 0.8),
    groups: int = 5,
    executor: str = "auto",
) -> dict[str, int]:
    """Sends a request in each round, some at a time: answers are the engine's alone, and nothing is leaked.

    Some clients leave before the end, some files of the store are damaged, and after so many groups of requests the
    server is closed, and another one opens the store. What the process holds between servers does not grow.

    Returns:
        What was asked, and what the process holds at first, and at most later.
    """
    model, rng, counts = cb.load_model("demo", dtype="float32"), random.Random(seed), collections.Counter(answers=0)
    held, left = [], iter(rounds)
    with _Alone(model, executor) as alone, ThreadPoolExecutor(AT_ONCE) as clients:
        while of_server := [group for _ in range(groups) if (group := list(itertools.islice(left, AT_ONCE)))]:
            with _server(model, directory / "kv", executor) as server:
                for group in of_server:
                    if rng.random() < 0.3:
                        counts["damaged files"] += _damage(directory / "kv", rng)
                    bodies = [_body(rng, modes, temperatures) for _ in group]
                    ways = [(rng.choice(["whole", "whole", "stream", "leave"]), rng.randrange(4)) for _ in group]
                    asked = [clients.submit(_ask, server, body, *way) for body, way in zip(bodies, ways, strict=True)]
                    for round_, body, (how, _), future in zip(group, bodies, ways, asked, strict=True):
                        _check(alone, body, future.result(), f"round {round_}: {how}, {body['cacheblend']}", counts)
                counts["damaged entries"] += server.engine.store.stats.damaged
            held.append(_settled(held[:1], model.runner.count))
    return dict(counts) | _leaks(held)


def _settled(first: Sequence[Resources], programs: int) -> Resources:
    """Returns what the process holds once that is about as little as at first, or else after a while.

    Threads of pools end, and TensorStore closes files that it has read, in their own time.
    """
    gives_up_at = time.monotonic() + SETTLING_S
    while True:
        now = Resources.now(programs)
        is_more = any(now.threads > _most(each.threads) or now.descriptors > _most(each.descriptors) for each in first)
        if not is_more or time.monotonic() > gives_up_at:
            return now
        time.sleep(0.05)


def _most(before: int, slack: int = FEW) -> float:
    return before * (1 + GROWTH) + slack


def _leaks(held: Sequence[Resources]) -> dict[str, int]:
    """Compares what the process held after a third of the servers with what it held later.

    A program takes memory of its own: memory is compared among the servers after the last one was compiled.
    """
    settled = [each for each in held if each.programs == held[-1].programs]
    report = {"servers": len(held), "servers after the last program": len(settled)}
    for what, among, slack in (("rss_bytes", settled, 0), ("threads", held, FEW), ("descriptors", held, FEW)):
        counts = [getattr(each, what) for each in among]
        before, after = max(counts[: len(counts) // 3 + 1]), max(counts)
        growth = f"{what} grew from {before} to {after} in {len(among)} servers"
        require(after <= _most(before, slack), growth)
        report |= {f"{what} at first": before, f"{what} later": after}
    return report


@contextlib.contextmanager
def _server(model: cb.Model, directory: Path, executor: str) -> Iterator[Running]:
    engine = _engine(model, cb.ChunkStore(directory, host_bytes=HOST_BYTES), executor)
    scheduler = cb.Scheduler(engine, slots=AT_ONCE - 1, max_tokens=128)
    with running(scheduler, engine=engine, model_name="m") as server:
        yield server


def _engine(model: cb.Model, store: cb.ChunkStore, executor: str) -> cb.Engine:
    blend = cb.BlendConfig(num_stages=1)  # each stage more is a fifth more to compile
    return cb.Engine(model, TenantStore(store), blend, context="", length_buckets=(128,), executor=executor)


def _body(rng: random.Random, modes: Sequence[str], temperatures: Sequence[float]) -> dict[str, Any]:
    """Draws a request, of few kinds, so that chunks come again."""
    texts = [*rng.sample(TEXTS, 2), rng.choice(QUESTIONS)]
    messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    how = {"temperature": rng.choice(temperatures), "seed": 7, "max_tokens": 6}
    return {"messages": messages, **how, "cacheblend": {"mode": rng.choice(modes)}}


def _ask(server: Running, body: dict[str, Any], how: str, events: int) -> dict[str, Any] | None:
    """Returns an answer's text and what was found; `None` where the client leaves after some events."""
    raw = json.dumps(body | {"stream": how != "whole"}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.address, timeout=PATIENCE_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        if how == "leave" and not events:
            return None
        with connection.makefile("rb") as answer:
            status = answer.readline()
            require(b" 200 " in status, status)
            if how == "whole":
                whole = json.loads(answer.read().partition(b"\r\n\r\n")[2])
                return {"text": whole["choices"][0]["message"]["content"], **whole["cacheblend"]}
            return _read_events(answer, events if how == "leave" else -1)


def _read_events(answer: Iterable[bytes], most: int) -> dict[str, Any] | None:
    text, found = "", {}
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            require("error" not in event, event)
            text += event["choices"][0]["delta"].get("content") or ""
            found |= event.get("cacheblend", {})
            most -= 1
            if not most:
                return None
    return {"text": text, **found}


def _check(
    alone: _Alone, body: dict[str, Any], answer: dict[str, Any] | None, where: str, counts: collections.Counter
) -> None:
    if answer is None:
        counts["left"] += 1
        return
    wanted = alone.text(body, answer["loaded"])
    require(answer["text"] == wanted, f"{where}: {answer['text']!r} instead of {wanted!r}")
    counts.update(answers=1, hits=sum(answer["loaded"]))


def _damage(directory: Path, rng: random.Random) -> int:
    """Flips a bit of a file of stored KV, or removes one; returns how many."""
    there = [path for path in sorted(directory.glob("packs/**/d/*")) if path.is_file() and path.stat().st_size]
    if not there:
        return 0
    victim = rng.choice(there)
    with contextlib.suppress(FileNotFoundError):  # the store may drop it meanwhile
        if rng.random() < 0.5:
            flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
        else:
            victim.unlink()
        return 1
    return 0


class _Alone:
    """What one engine answers a request alone, with the chunks from its store that the server had from its own."""

    def __init__(self, model: cb.Model, executor: str) -> None:
        self._engine = _engine(model, cb.ChunkStore(), executor)
        self._reader = RequestReader(ServingOptions(model_name="m"), model.tokenizer, self._engine.blend)
        self._texts: dict[str, str] = {}

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
        self._engine.store.close()

    def text(self, body: dict[str, Any], loaded: list[bool]) -> str:
        """Returns the answer where exactly these of its chunks are stored: for each case, in a tenant of its own."""
        case = json.dumps([body, loaded])
        if case not in self._texts:
            request = self._reader.chat(body, tenant=f"case {len(self._texts)}")
            chunks = [chunk for chunk, is_loaded in zip(request.prompt.chunks, loaded, strict=True) if is_loaded]
            self._precompute(request, chunks)
            how = {"max_new_tokens": request.max_tokens, "sampling": request.sampling}
            self._texts[case] = self._engine.generate(request.prompt, request.mode, **how).text
        return self._texts[case]

    def _precompute(self, request: AnswerRequest, chunks: list[Any]) -> None:
        if chunks and request.mode != "full":
            prompt = request.prompt
            self._engine.precompute(cb.Prompt(prompt.prefix, chunks, prompt.suffix, tenant=prompt.tenant))
