"""Calibration: what it fits and measures, that it leaves a store alone, and the command around it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HF, family_model, random_prompt, unchecked

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.engine.delays import ComputeModel
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.evaluation import layer_times, tier_speeds
from cacheblend_jax.evaluation.calibrate import calibrate
from cacheblend_jax.evaluation.tables import profile_text
from cacheblend_jax.runtime.link import DeviceLink


def test_calibration_finds_the_numbers_that_steps_were_made_with(monkeypatch):
    truth = ComputeModel(3e-4, 2e-7, 1e-6, 4e-6, 5e-9)

    class Planned:
        """An engine that only plans."""

        def __init__(self, model, store, blend, executor):
            self.planner = Planner(model.config, blend)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def precompute(self, prompt):
            pass

        def prefill(self, prompt):
            candidates = sum(len(chunk) for chunk in prompt.chunks)
            return SimpleNamespace(plan=self.planner.plan("blend", candidates + len(prompt.suffix), 0, candidates))

    def timed(engine, prompt):
        return truth.layer_seconds(engine.prefill(prompt).plan), 1e-3

    monkeypatch.setattr(layer_times, "Engine", Planned)
    monkeypatch.setattr(layer_times, "_timed_layers", timed)
    fitted, fit = layer_times.fit_compute(family_model("llama3"), (128, 512, 1024), (0.2, 0.5), repeats=2)
    assert fit["worst_error"] < 1e-6
    np.testing.assert_allclose(dataclasses.astuple(fitted), [*dataclasses.astuple(truth)[:5], 1e-3], rtol=1e-4)


def test_a_throttled_tier_is_measured_as_it_is(monkeypatch):
    model, memory = family_model("llama3"), cb.ChunkStore()
    now = {"s": 0.0}

    def sleep(seconds):
        now["s"] += seconds

    def open_store():
        return cb.store.ThrottledStore(memory, 1e6, 1e-3, clock=lambda: now["s"], sleep=sleep)

    monkeypatch.setattr(tier_speeds, "READERS", 1)
    monkeypatch.setattr(tier_speeds.time, "perf_counter", lambda: now["s"])
    tier, page_cache = tier_speeds._measured_tier(model, open_store, 2)
    assert (tier.name, page_cache) == ("disk", tier_speeds.NO_DISK)
    assert tier.bytes_per_s == pytest.approx(1e6, rel=0.01)
    assert tier.latency_s == pytest.approx(1e-3, rel=0.2)  # a read of one token's bytes is in it


def test_page_locked_and_pageable_memory_are_measured(monkeypatch):
    now, locked = {"s": 0.0}, []

    class TwoSpeeds(DeviceLink):
        """Takes four times as long from memory that is not page-locked."""

        def put(self, tree, placement):
            now["s"] += sum(leaf.nbytes for leaf in tree) / (4e6 if locked else 1e6)
            return super().put(tree, placement)

        def page_lock(self, buffer):
            locked.append(buffer)
            return SimpleNamespace(release=locked.clear)

    model = family_model("llama3")
    monkeypatch.setattr(tier_speeds.time, "perf_counter", lambda: now["s"])
    with unchecked():
        transfer, pageable = tier_speeds._measured_transfers(model, TwoSpeeds(model.placement), 2)
    assert (transfer.name, pageable.name) == ("transfer", "pageable")
    assert transfer.bytes_per_s == pytest.approx(4e6)
    assert pageable.bytes_per_s == pytest.approx(1e6)
    assert not locked
    monkeypatch.setattr(TwoSpeeds, "page_lock", lambda *_: None)
    only, other = tier_speeds._measured_transfers(model, TwoSpeeds(model.placement), 1)
    assert (only.name, only.bytes_per_s, other) == ("transfer", pytest.approx(1e6), None)


def test_probes_leave_the_store_alone_and_nothing_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tier_speeds, "PROBE_TOKENS", 16)
    model, directory = family_model("llama3"), tmp_path / "kv"
    with cb.ChunkStore(directory) as store, cb.Engine(model, store) as engine:
        engine.precompute(random_prompt(1))
    with cb.ChunkStore(directory) as store:
        kept = store.keys()
    profile = calibrate(model, directory, lengths=[64], ratios=[0.2], repeats=1)
    assert profile.store == str(directory)
    assert profile.tiers["disk"].bytes_per_s > 0
    assert "disk: " in profile_text(profile)
    assert capsys.readouterr().out == ""
    made = ["cacheblend-store.json", "index.sqlite", "packs", "quarantine", "writing"]
    assert sorted(path.name for path in directory.iterdir()) == made
    with cb.ChunkStore(directory) as store:
        assert store.keys() == kept
    with pytest.raises(cb.CacheBlendError, match="probes of 16 tokens could not be stored in"):
        tier_speeds.measure_tiers(
            model, lambda: cb.ChunkStore(tmp_path / "small", host_bytes=1, disk_bytes=1), repeats=1
        )


MODEL = ["--model", str(HF / "llama3"), "--dtype", "float32", "--no-compile-cache"]


def test_calibrate_then_ask_explains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = tmp_path / "report.json"
    assert (
        main(["calibrate", *MODEL, "--lengths", "128", "--ratios", "0.2", "--repeats", "1", "--json", str(report)]) == 0
    )
    assert "fit over" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert content["tiers"]["host"]["bytes_per_s"] > 0
    assert "layers" not in content["fit"]
    (tmp_path / "note.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.")
    trace = tmp_path / "trace.json"
    ask = ["ask", *MODEL, "--docs", str(tmp_path / "note.md"), "--max-new-tokens", "2"]
    options = ["--ratio", "auto", "--explain", "--executor", "streamed", "--trace", str(trace), "--json", str(report)]
    assert main([*ask, *options, "Where is Ana?"]) == 0
    printed = capsys.readouterr()
    assert "TTFT predicted" in printed.out
    assert content["saved"] in printed.out
    assert json.loads(trace.read_text())["traceEvents"]
    assert trace.with_suffix(".png").stat().st_size > 1000
    decision = json.loads(report.read_text())["answers"]["blend"]["prefill"]["decision"]
    assert decision["bound"] in ("floor", "load", "cap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["calibrate", "--store", "/vanished/mount/kv"], "/vanished/mount is not a directory; is it mounted?"),
        (["calibrate", "--lengths", "100000"], "no length of [100000] fits the model"),
        (["calibrate", "--lengths", "4"], "lengths must be at least 8 tokens"),
        (["calibrate", "--ratios", "2"], "recompute_ratio must be in [0, 1], got 2.0"),
        (["ask", "--docs", "README.md", "--explain", "why?"], "--explain needs --mode blend --ratio auto"),
        (
            ["ask", "--docs", "README.md", "--ratio", "auto", "--profile", "/nowhere.json", "why?"],
            "cannot read the profile",
        ),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("Ana leads the team.")
    monkeypatch.chdir(tmp_path)
    assert main([options[0], *MODEL, *options[1:]]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
