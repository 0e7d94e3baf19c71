"""What counts as a request's time, and what it must not wait for."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
from conftest import HF, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.engine import prefilling
from cacheblend_jax.errors import NotReadyError


def test_a_stopped_timer_leaves_out_what_raises_too(monkeypatch):
    now = 100.0
    monkeypatch.setattr(prefilling, "time", SimpleNamespace(perf_counter=lambda: now))
    timer = prefilling.Timer()
    now += 1.0
    with timer.stopped():
        now += 10.0
    with suppress(KeyError), timer.stopped():
        now += 20.0
        raise KeyError
    now += 2.0
    assert timer.elapsed_s() == 3.0


def test_the_oracles_own_prefill_waits_for_the_compiler_beside_others_too():
    blend = cb.BlendConfig(0.3, "oracle", num_stages=1)
    engine, prompt = cb.Engine(cb.load_model(HF / "llama2", dtype="float32"), blend=blend), random_prompt(1)
    engine.precompute(prompt)
    for _ in range(2):
        with pytest.raises(NotReadyError) as needed:
            engine.prefill(prompt, only_if_ready=True)
        needed.value.work()
    count = engine.model.runner.count
    engine.prefill(prompt, only_if_ready=True)
    assert engine.model.runner.count == count


def test_what_has_been_checked_is_not_checked_again(monkeypatch):
    engine, prompt = cb.Engine(cb.load_model(HF / "llama2", dtype="float32")), random_prompt(1)
    checked, wanted = engine.check(prompt), engine.prefill(prompt, "full").next_token
    monkeypatch.setattr(prefilling, "tokenize_prompt", None)
    assert engine.prefill(checked, "full").next_token == wanted
