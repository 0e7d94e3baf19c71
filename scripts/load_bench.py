"""How `cacheblend-jax serve` bears load: TTFT against requests/s by mode, as in the paper's figure 14.

    python scripts/load_bench.py --model demo --json load.json --figure load.png
    python scripts/load_bench.py --model SmolLM2.gguf --chunks 2 --new-tokens 16

The server is a process of its own, asked over loopback; every chunk is stored and every program compiled before. For
each mode: requests one after another (unloaded), by turns with an engine in this process that is asked directly; as
many clients as there are slots twice over, each with one request at a time (the capacity); then an open loop, whose
requests arrive at random (Poisson) at shares of that capacity, whether earlier ones are answered or not.

Each point takes `--seconds`, and those near the capacity longer, until all is answered. TTFT counts from the moment
that a request is due until the first text of its answer is here. The engine's own counts from token ids, so that what
`serve` adds has reading and tokenising a request in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import cacheblend_jax as cb
from cacheblend_jax.evaluation.figures import BLUE, GREEN, MARKERS, new_figure
from cacheblend_jax.serving import ServingOptions
from cacheblend_jax.serving.requests import RequestReader
from cacheblend_jax.store import TenantStore
from scripts.bench_parts.clients import Answered, Client, LoneClient

MODES = ("full", "prefix", "blend")
COLOURS = dict(zip(MODES, ("black", GREEN, BLUE), strict=True))
SHARES = (0.25, 0.5, 0.65, 0.8, 0.95, 1.1)  # of a mode's capacity
ALONE = 40  # requests one after another
WATCHED = 0.8  # the share at which the tail is compared with the unloaded server's
WORDS = "the of a in to and is was for on that with by as at from it an be this which or are not have had but".split()


@dataclass(frozen=True)
class Load:
    """What is asked: prompts of a system text, chunks of a pool in any order, and a question, all of one length."""

    chunks: int
    chunk_words: int
    pool: int
    new_tokens: int
    seed: int

    def system(self) -> str:
        """Returns the system text: what prefix caching finds."""
        return self._words(0, self.chunk_words)

    def chunk(self, number: int) -> str:
        """Returns a chunk of the pool."""
        return self._words(1 + number, self.chunk_words)

    def request(self, number: int, mode: str) -> dict[str, Any]:
        """Returns the body of a request."""
        chosen = np.random.default_rng([self.seed, number]).choice(self.pool, self.chunks, replace=False)
        question = self._words(10_000 + number, 24)
        parts = [{"type": "text", "text": text} for text in (*map(self.chunk, chosen), question)]
        messages = [{"role": "system", "content": self.system()}, {"role": "user", "content": parts}]
        how = {"temperature": 0, "max_tokens": self.new_tokens, "stream": True, "cacheblend": {"mode": mode}}
        return {"messages": messages, **how, "stream_options": {"include_usage": True}}

    def _words(self, number: int, count: int) -> str:
        return " ".join(np.random.default_rng([self.seed, 1, number]).choice(WORDS, count))


@dataclass(frozen=True)
class Point:
    """What came of a number of requests; times in seconds."""

    mode: str
    kind: str
    offered_per_s: float
    answered_per_s: float
    tokens_per_s: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    requests: int
    refused: int

    @classmethod
    def of(cls, mode: str, kind: str, offered_per_s: float, seconds: float, answers: Sequence[Answered]) -> Point:
        """Sums up the answers of some seconds."""
        good = [each for each in answers if each.status == 200]
        ttft = np.asarray([each.ttft_s for each in good] or [float("nan")])
        rates = len(good) / seconds, sum(each.tokens for each in good) / seconds
        times = float(ttft.mean()), *map(float, np.percentile(ttft, [50, 95]))
        return cls(mode, kind, offered_per_s, *rates, *times, len(answers), len(answers) - len(good))

    def line(self) -> str:
        """Returns a row of the table."""
        times = " | ".join(f"{1e3 * each:.0f}" for each in (self.ttft_mean, self.ttft_p50, self.ttft_p95))
        rates = f"{self.offered_per_s:.2f} | {self.answered_per_s:.2f} | {self.tokens_per_s:.1f}"
        return f"| {self.mode} | {self.kind} | {rates} | {times} | {self.requests} | {self.refused} |"


@contextlib.contextmanager
def serving(model: str, load: Load, slots: int, most_tokens: int) -> Iterator[str]:
    """Runs `serve` in a process of its own; yields its address once it has warmed up.

    Without that, a prefill that comes near 100 ms under load has programs compiled that let answers go on meanwhile.
    """
    command = [sys.executable, "-m", "cacheblend_jax", "serve", "--model", model, "--port", "0", "--model-name", "m"]
    command += ["--slots", str(slots), "--slot-tokens", str(most_tokens), "--waiting", "1000"]
    command += ["--warm-up", str(most_tokens)]
    with tempfile.NamedTemporaryFile("w+") as said, subprocess.Popen(command, stderr=said) as process:
        try:
            url = _address_of(process, Path(said.name))
            while not _is_ready(url):
                time.sleep(0.5)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


def _address_of(process: subprocess.Popen, said: Path) -> str:
    """Waits until a server has said where it listens."""
    while process.poll() is None:
        if found := re.search(r"at (http://\S+)/v1", said.read_text()):
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{said.read_text()}")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health"):
            return True
    except urllib.error.HTTPError:  # 503
        return False


def one_at_a_time(
    address: tuple[str, int], load: Load, mode: str, count: int, direct: Callable[[dict[str, Any]], float]
) -> tuple[Point, dict[str, float]]:
    """Asks the server, and the engine in this process, by turns; returns also how much longer the server takes."""
    answers, alone, began = [], [], time.perf_counter()
    with contextlib.closing(LoneClient(address)) as client:
        for number in range(count):
            request = load.request(number, mode) | {"max_tokens": 1}
            answers.append(client.ask(request))
            alone.append(direct(request))
    point = Point.of(mode, "unloaded", 0.0, time.perf_counter() - began, answers)
    more = [each.ttft_s - engine for each, engine in zip(answers, alone, strict=True)]
    engine, added = float(np.median(alone)), float(np.median(more))
    return point, {"engine_ttft_s": engine, "added_s": added, "overhead": added / engine}


async def at_capacity(client: Client, load: Load, mode: str, clients: int, seconds: float) -> Point:
    """Keeps so many clients busy for a time."""
    began, answers = time.perf_counter(), []
    numbers = iter(range(10**9))

    async def keep_asking() -> None:
        while time.perf_counter() < began + seconds:
            answers.append(await client.ask(load.request(next(numbers), mode)))

    await asyncio.gather(*(keep_asking() for _ in range(clients)))
    took = time.perf_counter() - began
    return Point.of(mode, f"{clients} clients", len(answers) / took, took, answers)


async def at_rate(client: Client, load: Load, mode: str, share: float, rate: float, seconds: float) -> Point:
    """Sends requests that arrive at random at a rate, for a time; all are answered in the end."""
    due = arrivals(np.random.default_rng([load.seed, 2, MODES.index(mode), round(100 * share)]), rate, seconds)
    began = time.perf_counter()

    async def ask(number: int, at: float) -> Answered:
        await asyncio.sleep(max(began + at - time.perf_counter(), 0))
        return await client.ask(load.request(number, mode), began + at)

    answers = await asyncio.gather(*(ask(number, at) for number, at in enumerate(due)))
    return Point.of(mode, f"{share:.0%}", len(due) / seconds, time.perf_counter() - began, answers)


def arrivals(rng: np.random.Generator, rate: float, seconds: float) -> np.ndarray:
    """Returns when requests are due: a Poisson process that has as many of them as are expected."""
    return np.sort(rng.uniform(0, seconds, max(round(rate * seconds), 1)))


class Direct:
    """An engine in this process with the same chunks, and the server's way of reading requests."""

    def __init__(self, name: str, load: Load) -> None:
        model = cb.load_model(name)
        self._engine = cb.Engine(model, TenantStore(cb.ChunkStore()))
        self._reader = RequestReader(ServingOptions(model_name="m"), model.tokenizer, self._engine.blend)
        body = {"chunks": [load.chunk(number) for number in range(load.pool)], "system": load.system()}
        self._engine.precompute(self._reader.chunks(body, ""))
        self.prompt_tokens = self._ids(load.request(0, "full")).token_ids.size

    def ttft(self, body: dict[str, Any]) -> float:
        """Prefills a request's prompt; returns the seconds from token ids to the first token."""
        read = self._reader.chat(body, "")
        began = time.perf_counter()
        self._engine.prefill(read.prompt, read.mode, blend=read.blend)
        return time.perf_counter() - began

    def _ids(self, body: dict[str, Any]) -> Any:
        return self._engine.check(self._reader.chat(body, "").prompt)


async def measure(
    client: Client, direct: Direct, load: Load, slots: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Measures all modes."""
    body = {"chunks": [load.chunk(number) for number in range(load.pool)], "system": load.system()}
    await client.post("/v1/chunks", body)
    few = replace(load, new_tokens=2)
    for mode in MODES:  # compiles what is needed, here and there; the first stores the prefix
        for number in range(3):
            await client.ask(few.request(number, mode))
            direct.ttft(few.request(number, mode))
    for mode in MODES:  # together: prefills that pause have programs of their own
        await asyncio.gather(*(client.ask(load.request(number, mode)) for number in range(2 * slots)))
    points: list[Point] = []
    summary: dict[str, dict[str, float]] = {}

    async def add(measured: Awaitable[Point]) -> Point:
        points.append(await measured)
        log(points[-1].line())
        return points[-1]

    for mode in MODES:
        unloaded, summary[mode] = one_at_a_time(client.address, load, mode, ALONE, direct.ttft)
        points.append(unloaded)
        log(unloaded.line())
        capacity = (await add(at_capacity(client, load, mode, 2 * slots, seconds))).answered_per_s
        for share in SHARES:
            point = await add(at_rate(client, load, mode, share, share * capacity, seconds))
            if share == WATCHED:
                summary[mode]["p95_of_unloaded"] = point.ttft_p95 / unloaded.ttft_p95
        summary[mode]["capacity_per_s"] = capacity
    return {"points": [asdict(point) for point in points], "summary": summary}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws mean TTFT, and its 95th percentile, against requests/s; where a mode saturates is a dashed line."""
    figure, axes = new_figure((9, 3.6), columns=2)
    for axis, key, title in zip(axes[0], ("ttft_mean", "ttft_p95"), ("mean", "95th percentile"), strict=True):
        for mode, marker in zip(MODES, MARKERS, strict=False):
            points = [each for each in report["points"] if each["mode"] == mode and each["kind"].endswith("%")]
            rates, times = ([each[name] for each in points] for name in ("offered_per_s", key))
            axis.plot(rates, times, color=COLOURS[mode], marker=marker, label=mode)
            axis.axvline(report["summary"][mode]["capacity_per_s"], color=COLOURS[mode], linestyle="--", linewidth=0.8)
        axis.set(xlabel="requests/s", ylabel="time to first token, s", title=title, xlim=(0, None), ylim=(0, None))
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables; writes the figure and all numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chunks", type=int, default=6, help="of a prompt")
    parser.add_argument("--chunk-words", type=int, default=128, help="about as many tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=12, help="for each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parsed = parser.parse_args(arguments)
    load = Load(parsed.chunks, parsed.chunk_words, max(2 * parsed.chunks, 8), parsed.new_tokens, parsed.seed)
    direct = Direct(parsed.model, load)
    room = direct.prompt_tokens + load.new_tokens
    with serving(parsed.model, load, parsed.slots, room) as url:
        print(f"prompts of {direct.prompt_tokens} tokens, {load.new_tokens} new ones, {parsed.slots} slots")
        print("| mode | load | offered/s | answered/s | tokens/s | TTFT, ms | median | p95 | requests | refused |")
        print(f"| --- | --- |{' ---: |' * 8}")
        log = lambda line: print(line, flush=True)  # noqa: E731
        report = asyncio.run(measure(Client(url), direct, load, parsed.slots, parsed.seconds, log))
    print("| mode | engine, ms | serve adds, ms | overhead | saturates at, requests/s | p95 at 80 % of unloaded's |")
    print(f"| --- |{' ---: |' * 5}")
    for mode, each in report["summary"].items():
        times = f"{1e3 * each['engine_ttft_s']:.1f} | {1e3 * each['added_s']:.1f} | {each['overhead']:.1%}"
        print(f"| {mode} | {times} | {each['capacity_per_s']:.2f} | {each['p95_of_unloaded']:.2f} × |")
    report |= {
        "model": parsed.model,
        "load": asdict(load),
        "prompt_tokens": direct.prompt_tokens,
        "slots": parsed.slots,
    }
    if parsed.json:
        parsed.json.write_text(json.dumps(report, indent=1) + "\n")
    if parsed.figure:
        draw(report, parsed.figure)


if __name__ == "__main__":
    main()
