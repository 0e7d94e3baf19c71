"""The script that simulates services: what it writes, what it draws, and what it says of queues that only grow."""

from __future__ import annotations

import json

import pytest
from conftest import unchecked

from scripts import simulate_scale

SMALL = ["service", "--requests-per-replica", "40", "--earlier-requests", "0", "--sample", "2", "--exponent", "1.2"]


@pytest.fixture(autouse=True)
def _quickly():
    with unchecked():
        yield


def simulated(path, *options: str) -> list[dict]:
    simulate_scale.main([*SMALL, "--out", str(path), *options])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_services_are_simulated_once_and_drawn_beside_those_that_are_alike(tmp_path, monkeypatch):
    drawn, out = [], tmp_path / "services.jsonl"

    def draw(lines):
        drawn.append([(line["asked"]["replicas"], line["asked"]["routing"]) for line in lines])
        return original(lines)

    original = simulate_scale.scale_figure
    monkeypatch.setattr(simulate_scale, "scale_figure", draw)
    assert len(simulated(out, "--replicas", "1", "4")) == 3
    assert len(simulated(out, "--replicas", "1", "--tier", "network")) == 4
    lines = simulated(out, "--replicas", "4", "--plot", str(tmp_path / "scale.png"))
    assert len(lines) == 4
    assert drawn == [[(1, "chunks"), (4, "chunks"), (4, "random")]]
    assert [line["simulated"]["replicas"] for line in lines] == [1, 4, 2, 1]  # at random, two stand for four


def test_a_sample_of_replicas_asks_the_store_for_as_much_as_all_would(tmp_path):
    every, part = (
        simulated(tmp_path / sample, "--replicas", "8", "--routing", "random", "--sample", sample)[0]
        for sample in ("8", "4")
    )
    assert part["store_gb_per_s"] == pytest.approx(every["store_gb_per_s"], rel=0.4)
    assert part["busy_share"] == pytest.approx(every["busy_share"], rel=0.2)


def test_a_queue_that_only_grows_has_no_percentiles(tmp_path):
    slow = ("--replicas", "1", "--store-gb-per-s", "0.01", "--device-gb", "0", "--host-gb", "0.05")
    line = simulated(tmp_path / "slow.jsonl", *slow, "--requests-per-s", "30")[0]
    assert line["ttft_s"] is None
    assert line["full_ttft_s"] is None
    assert simulate_scale.queue_percentiles(0.05, 10.0, seed=0)[50] >= 0.05
