"""`examples/serve_ray.py` with two replicas on one machine: they share what they store, and one may die."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import os
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving_cases import QUESTION

import cacheblend_jax as cb
from cacheblend_jax.serving import bound_socket, chunk_weights, ranked

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

# Ray forks before it executes its own programs, and leaves processes to end by themselves.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
TEXTS = [
    f"{city} is now home to {name}. " * times
    for times, city, name in itertools.product((1, 2, 3), ("Oslo", "Lima", "Rome"), ("Cobalt", "Ridge", "Granite"))
]


class Cluster:
    """Two replicas, and a client of the front."""

    def __init__(self, client: httpx.Client, store: Path) -> None:
        self.client, self.store = client, store

    @property
    def actors(self) -> dict[str, dict[str, str]]:
        """The actors of the replicas, by the replicas' names."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"].rsplit("#", 1)[1]: actor for actor in named if "#Replica#" in actor["name"]}

    def ask(self, chunks: list[str]) -> httpx.Response:
        content = [{"type": "text", "text": text} for text in (*chunks, QUESTION)]
        blend = {"mode": "reuse"}
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
        return self.client.post("/v1/chat/completions", json={**body, "cacheblend": blend})

    def stored(self, chunks: list[str]) -> tuple[str, list[dict]]:
        """Which replica was asked, and what it has of the chunks."""
        answer = self.client.post("/v1/chunks/lookup", json={"chunks": chunks})
        return answer.headers["x-replica"], answer.json()["data"]

    def kill(self, name: str) -> None:
        actor = self.actors[name]
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "examples"), str(ROOT)]))  # of the workers
        yield importlib.import_module("serve_ray")
        sys.modules.pop("serve_ray")


@pytest.fixture(scope="module")
def cluster(example, tmp_path_factory):
    store = tmp_path_factory.mktemp("ray") / "kv"
    with contextlib.closing(bound_socket("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the user's home
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            sizes = {"slots": 2, "slot_tokens": 256, "min_replicas": 2, "max_replicas": 2}
            serve.run(example.app(example.Settings(store=str(store), **sizes)))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
                yield Cluster(client, store)
        finally:
            serve.shutdown()
            ray.shutdown()


def homes(names: list[str]) -> dict[str, list[str]]:
    """The texts that belong to each replica."""
    by_home: dict[str, list[str]] = {name: [] for name in names}
    for text in TEXTS:
        by_home[ranked(chunk_weights(json.dumps({"chunks": [text]}).encode()), names)[0]].append(text)
    return by_home


def test_a_stream_whose_replica_dies_ends_with_an_error(example):
    async def dying():
        yield {"body": b"data: 2\n\n"}
        raise ray.exceptions.RayActorError

    async def read() -> list[bytes]:
        return [each async for each in example.events({"body": b"data: 1\n\n"}, dying())]

    *sent, last = asyncio.run(read())
    assert sent == [b"data: 1\n\n", b"data: 2\n\n"]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "cancelled"


def test_the_front_passes_on_streams_and_refusals(cluster):
    question = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3, "stream": True}
    with cluster.client.stream("POST", "/v1/chat/completions", json=question) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert (answer.status_code, events[-1]) == (200, "data: [DONE]")
    assert answer.headers["x-replica"] in cluster.actors
    refused = [
        cluster.client.get("/metrics"),
        cluster.client.post("/v1/chat/completions", json={"messages": 3}),
        cluster.client.post("/v1/completions", json={"prompt": "a" * 2**23}),
        cluster.client.post("/v1/chunks", json={"chunks": TEXTS[-1:], "pin": True}),
    ]
    assert [each.status_code for each in refused] == [404, 400, 413, 409]
    assert all(each.json()["error"]["message"] for each in refused)


def test_replicas_share_what_they_store_and_one_may_die_under_load(cluster):
    names = sorted(cluster.actors)
    assert len(names) == 2
    of = homes(names)
    first, second = names
    short, long = of[first][:2], max(of[second], key=len)
    while sum(map(len, short)) >= len(long):
        short = short[:-1]

    missed = cluster.ask(short)
    assert missed.headers["x-replica"] == first
    assert missed.json()["cacheblend"]["misses"] == len(short)
    # What a request missed is written after its answer.
    deadline = time.monotonic() + PATIENCE_S
    asked, entries = cluster.stored([*short, long])
    while not all(each["stored"] for each in entries[:-1]) and time.monotonic() < deadline:
        asked, entries = cluster.stored([*short, long])
    assert asked == second
    shared = cluster.ask([*short, long])
    assert shared.headers["x-replica"] == second
    assert shared.json()["cacheblend"]["loaded"] == [True] * len(short) + [False]

    wanted = cluster.ask(short)
    assert (wanted.headers["x-replica"], wanted.json()["cacheblend"]["hits"]) == (first, len(short))
    answered = threading.Semaphore(0)

    def ask(_: int) -> httpx.Response:
        answer = cluster.ask(short)
        answered.release()
        return answer

    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask, number) for number in range(30)]
        for _ in range(4):
            assert answered.acquire(timeout=PATIENCE_S)
        cluster.kill(first)
        answers = [answer.result() for answer in answers]
    assert {answer.status_code for answer in answers} == {200}
    told = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert told == {wanted.json()["choices"][0]["message"]["content"]}
    assert {answer.json()["cacheblend"]["hits"] for answer in answers} == {len(short)}
    assert second in {answer.headers["x-replica"] for answer in answers}
    with cb.ChunkStore(cluster.store) as store:
        assert all(store.get(each["id"]) is not None for each in entries[:-1])
