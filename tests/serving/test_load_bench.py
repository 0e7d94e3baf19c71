"""The load script's parts: arrivals, a client that reads events, and the figure."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import numpy as np
import pytest
from serving_cases import running

from scripts.load_bench import (
    MODES,
    SHARES,
    Answered,
    Client,
    Load,
    LoneClient,
    Point,
    arrivals,
    at_rate,
    draw,
    one_at_a_time,
)

LOAD = Load(chunks=2, chunk_words=5, pool=4, new_tokens=3, seed=0)


def test_arrivals_come_at_the_rate_and_are_a_seeds_own():
    one, same, other = (arrivals(np.random.default_rng(seed), 5.0, 100.0) for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    assert (one.size, one.min() >= 0, one.max() <= 100) == (500, True, True)
    gaps = np.diff(one)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)  # exponential


def test_requests_are_asked_when_they_are_due_and_counted():
    assert LOAD.request(1, "blend") == LOAD.request(1, "blend") != LOAD.request(2, "blend")
    with running(model_name="m") as server:
        client = Client(server.url)
        point = asyncio.run(at_rate(client, LOAD, "full", 0.8, 1000.0, 0.004))
        refused = asyncio.run(client.ask({}))
    assert (point.mode, point.kind, point.requests, point.refused) == ("full", "80%", 4, 0)
    assert point.tokens_per_s == pytest.approx(3 * point.answered_per_s)
    assert [each["mode"] for each in server.scheduler.submitted] == ["full"] * 4
    assert refused.status == 400


def test_a_lone_client_asks_over_one_connection_by_turns_with_the_engine(monkeypatch):
    connect, connected, asked = socket.create_connection, [], []
    monkeypatch.setattr(socket, "create_connection", lambda *where: (connected.append(where), connect(*where))[1])
    with running(model_name="m") as server:
        point, added = one_at_a_time(server.address, LOAD, "full", 3, lambda body: (asked.append(body), 1e-9)[1])
        assert len(connected) == 1
        with contextlib.closing(LoneClient(server.address)) as client, pytest.raises(SystemExit, match="400"):
            client.ask({})
    assert (point.kind, point.requests, point.refused) == ("unloaded", 3, 0)
    assert asked == [LOAD.request(number, "full") | {"max_tokens": 1} for number in range(3)]
    assert 0 < added["added_s"] == pytest.approx(point.ttft_p50, abs=1e-6)


def test_what_was_refused_counts_as_no_answer():
    answers = [Answered(0.2, 1, 7, 200), Answered(0.4, 1, 7, 200), Answered(9, 9, 0, 429)]
    point = Point.of("blend", "110%", 3.0, 2.0, answers)
    assert (point.answered_per_s, point.tokens_per_s, point.refused) == (1, 7, 1)
    assert point.ttft_mean == pytest.approx(0.3)


def test_the_figure_has_a_line_of_each_mode(tmp_path):
    pytest.importorskip("matplotlib")
    answers = [Answered(0.2, 1, 7, 200)]
    points = [vars(Point.of(mode, f"{share:.0%}", share, 1.0, answers)) for mode in MODES for share in SHARES]
    draw({"points": points, "summary": {mode: {"capacity_per_s": 1.0} for mode in MODES}}, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000
