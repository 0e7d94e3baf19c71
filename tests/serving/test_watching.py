"""What operators see: health, metrics, the dashboard; and how a server begins and ends."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from serving_cases import CHUNKS, QUESTION, ScriptedScheduler, get, post, running
from starlette.applications import Starlette

import cacheblend_jax as cb
from cacheblend_jax.serving import ServingOptions, bound_socket, make_app, run_server
from cacheblend_jax.serving.health import Health
from cacheblend_jax.serving.service import THREADS
from cacheblend_jax.store import StoreStats, TenantStore

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
CHAT = "/v1/chat/completions"


def chat(*texts: str, **fields) -> dict:
    content = [{"type": "text", "text": text} for text in (*texts, QUESTION)]
    return {"messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def samples(server) -> dict[str, float]:
    lines = get(server.url + "/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_requests_their_times_and_tokens_are_counted(server):
    post(server.url + "/v1/chunks", json={"chunks": CHUNKS[:1]}).raise_for_status()
    before = samples(server)
    answer = post(server.url + CHAT, json=chat(*CHUNKS, cacheblend={"mode": "reuse"})).json()
    post(server.url + CHAT, json={})
    after = samples(server)

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained('cacheblend_requests_total{endpoint="/v1/chat/completions",status="200"}') == 1
    assert gained('cacheblend_requests_total{endpoint="/v1/chat/completions",status="400"}') == 1
    assert gained('cacheblend_ttft_seconds_count{mode="reuse"}') == 1
    assert gained('cacheblend_token_seconds_count{mode="reuse"}') == 4
    assert gained('cacheblend_token_seconds_sum{mode="reuse"}') == 1.0  # as the answer says, however it is read
    assert gained('cacheblend_chunks_total{found="hit"}') == gained('cacheblend_chunks_total{found="miss"}') == 1
    assert gained('cacheblend_prompt_tokens_total{kind="hit"}') == answer["cacheblend"]["reused_tokens"] > 0
    assert gained('cacheblend_prompt_tokens_total{kind="missed"}') > 0
    assert gained("cacheblend_answer_tokens_total") == 5
    assert after["cacheblend_hit_rate"] == 0.5
    assert after['cacheblend_store_bytes{tier="host"}'] == server.engine.store.stats.host.bytes > 0
    assert after["cacheblend_requests_running"] == 0


def test_a_first_event_does_not_wait_to_be_counted(server, monkeypatch):
    happened, body = [], json.dumps(chat(stream=True)).encode()
    received = iter([{"type": "http.request", "body": body}])
    metrics = server.app.state.service.metrics
    monkeypatch.setattr(metrics, "prefilled", lambda *_: happened.append("counted"))
    monkeypatch.setattr(metrics.requests, "labels", lambda *_: happened.append("counted") or metrics.answer_tokens)

    async def receive():
        return next(received, None) or await asyncio.Event().wait()

    async def send(message):
        happened.append(message.get("body"))

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
    asyncio.run(server.app(scope, receive, send))
    assert happened[0] is None  # the head
    assert b"The " in happened[1]
    assert happened.count("counted") == 2


def test_the_dashboard_asks_for_what_there_is(server):
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(each["expr"] for panel in panels for each in panel["targets"])
    asked = set(re.findall(r"cacheblend_\w+", queries))
    there = {name.partition("{")[0] for name in samples(server)}
    post(server.url + CHAT, json=chat())
    there |= {name.partition("{")[0] for name in samples(server)}
    assert len(asked) > 15
    assert asked <= there


def test_a_server_is_ready_once_it_is_warm():
    warm = threading.Event()
    with running(warm_up=warm.wait) as server:
        answer = get(server.url + "/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "starting")
        assert get(server.url + "/health/live").status_code == 200
        warm.set()
        while (answer := get(server.url + "/health")).status_code == 503:
            pass
        assert answer.json() == {"status": "ready", "reasons": []}


def test_health_and_metrics_are_told_while_requests_take_all_threads():
    go_on = threading.Event()
    with running() as server, ThreadPoolExecutor(THREADS) as clients:
        submit, began = server.scheduler.submit, threading.Semaphore(0)

        def slow(*arguments, **options):
            began.release()
            go_on.wait()
            return submit(*arguments, **options)

        server.scheduler.submit = slow
        try:
            asked = [clients.submit(httpx.post, server.url + CHAT, json=chat(), timeout=60) for _ in range(THREADS)]
            for _ in asked:
                began.acquire()
            for path in ("/health", "/metrics"):
                assert httpx.get(server.url + path, timeout=300).status_code == 200
        finally:
            go_on.set()
        assert [each.result().status_code for each in asked] == [200] * THREADS


def test_a_server_whose_scheduler_has_ended_says_that_others_should_be_asked():
    def refuse(*arguments, **options):
        raise cb.SchedulerClosed("the scheduler is closed; make another")

    with running() as server:
        server.scheduler.submit = refuse
        for _ in range(2):
            answer = post(server.url + CHAT, json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        assert get(server.url + "/health").json()["status"] == "stopping"


def test_a_warm_up_that_fails_leaves_a_server_that_answers(caplog):
    def fail() -> None:
        raise RuntimeError("no compiler")

    with running(warm_up=fail) as server:
        while get(server.url + "/health").status_code == 503:
            pass
        assert post(server.url + CHAT, json=chat()).status_code == 200
    assert "warming up failed" in caplog.text


class FailingStore(cb.ChunkStore):
    """A store whose tiers and counts are what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: tuple[str, ...] = ("host", "disk")
        self.counts = StoreStats()

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.shown

    @property
    def stats(self) -> StoreStats:
        return self.counts


def test_a_tier_that_fails_degrades_and_one_that_works_again_does_not():
    store = FailingStore()
    health = Health(store)
    health.warmed_up()
    assert health.report()["status"] == "ready"
    store.shown = ("host",)
    assert health.report() == {
        "status": "degraded",
        "reasons": ["reads from the disk tier fail: its entries count as missing"],
    }
    assert health.is_ready
    store.shown = ("host", "disk")
    store.counts = replace(store.counts, write_errors=1)
    assert "writes to the disk tier fail" in health.report()["reasons"][0]
    assert "writes to the disk tier fail" in health.report()["reasons"][0]  # until one succeeds
    store.counts = replace(store.counts, written=1)
    assert health.report()["status"] == "ready"
    store.counts = replace(store.counts, unwritable=1)
    assert "cannot be written" in health.report()["reasons"][0]


def test_a_server_that_ends_finishes_what_runs_and_closes_what_it_was_given(tmp_path):
    engine = cb.Engine(cb.load_model("demo"), TenantStore(cb.ChunkStore(tmp_path / "kv")))
    with running(engine=engine) as server, ThreadPoolExecutor(1) as client:
        post(server.url + "/v1/chunks", json={"chunks": CHUNKS}).raise_for_status()
        server.scheduler.gate.clear()
        answer = client.submit(httpx.post, server.url + CHAT, json=chat(), timeout=60)
        server.scheduler.answers.get(timeout=300)
        server.server.should_exit = True
        while server.thread.is_alive():  # it waits for the answer, and takes no more
            try:
                httpx.get(server.url + "/health/live")
            except httpx.TransportError:
                break
        server.scheduler.gate.set()
        assert answer.result().json()["choices"][0]["finish_reason"] == "stop"
        server.thread.join(60)
    assert server.scheduler.is_closed
    assert server.app.state.service.is_closed
    with cb.ChunkStore(tmp_path / "kv") as store:
        assert len(store) >= 2


def test_what_does_not_end_is_left_after_so_long(caplog):
    never = threading.Event()
    with running(stop_s=2.0) as server:
        server.scheduler.close = lambda timeout_s=None: never.wait(30)
    assert not server.app.state.service.is_closed
    assert "not everything was written within 1 s" in caplog.text
    never.set()


def test_what_cannot_be_served_is_refused_at_once():
    model = cb.load_model("demo")
    engine = cb.Engine(model)
    with pytest.raises(cb.CacheBlendError, match="needs an engine over a TenantStore"):
        make_app(engine, ScriptedScheduler(engine))
    without = cb.Engine(replace(model, tokenizer=None), TenantStore(cb.ChunkStore()), context="")
    with pytest.raises(cb.CacheBlendError, match="no tokenizer"):
        make_app(without, ScriptedScheduler(without))
    with pytest.raises(cb.CacheBlendError, match="unknown mode 'fast'"):
        ServingOptions(mode="fast")
    for temperature in (-0.1, 2.1, float("nan")):
        with pytest.raises(cb.CacheBlendError, match=r"temperature must be in \[0, 2\]"):
            ServingOptions(temperature=temperature)


def test_an_address_that_cannot_be_had_is_named():
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(cb.CacheBlendError, match=f"cannot listen on 127.0.0.1 port {port}: .*choose another"):
            bound_socket("127.0.0.1", port)
    for host, port in (("nowhere.invalid", 80), ("127.0.0.1", 70_000)):
        with pytest.raises(cb.CacheBlendError, match=f"cannot listen on {host} port {port}"):
            bound_socket(host, port)


def test_an_address_that_another_has_begun_to_listen_at_is_named():
    with bound_socket("127.0.0.1", 0) as first, bound_socket("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(cb.CacheBlendError, match=r"cannot listen on 127.0.0.1 port \d+: .*choose another"):
            run_server(Starlette(), second)
