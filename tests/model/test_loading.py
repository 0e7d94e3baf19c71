"""Loading on a thread: programs are compiled before any weight is there; the model that comes needs no others."""

from __future__ import annotations

import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import HF, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.model import loading as loading_module
from cacheblend_jax.model.loading import loading_model
from cacheblend_jax.runtime.turns import TURN_SECONDS

SECONDS = 300  # only a failing test waits that long
BLEND = cb.BlendConfig(num_stages=1)  # few to compile


@pytest.fixture
def gate(monkeypatch):
    """Weights are read only once it is set."""
    may_read, load = threading.Event(), loading_module.load_params

    def wait_and_load(*args, **options):
        assert may_read.wait(SECONDS)
        return load(*args, **options)

    monkeypatch.setattr(loading_module, "load_params", wait_and_load)
    yield may_read
    may_read.set()


@pytest.mark.parametrize("context", ["", pytest.param(np.arange(70, dtype=np.int32), marks=pytest.mark.once)])
def test_what_is_compiled_without_weights_is_all_that_a_prompt_needs(gate, context):
    prompt = random_prompt(0, chunk_lengths=(30, 40, 30))
    with loading_model(HF / "llama3") as loading:
        outline, done = loading.outline, []
        with cb.Engine(outline, blend=BLEND, context=context) as ahead:
            ahead.prepare(prompt, max_new_tokens=3, progress=lambda *counts: done.append(counts))
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outline.params))
        # A prefill and a decoder; stand-alone KV of one size, and that of chunks after a context that they share.
        assert done[-1] == (len(done), 4 if len(context) else 3)
        compiled = outline.runner.count
        gate.set()
        model = loading.model()
    assert compiled == len(done) + 2  # a cache is copied to grow, and the first token is drawn
    assert (model.runner, model.fingerprint) == (outline.runner, outline.fingerprint)
    with cb.Engine(model, blend=BLEND, context=context) as engine:
        engine.precompute(prompt)
        answer = engine.generate(prompt, max_new_tokens=3)
    assert model.runner.count == compiled
    with cb.Engine(cb.load_model(HF / "llama3"), blend=BLEND, context=context) as alone:
        alone.precompute(prompt)
        assert alone.generate(prompt, max_new_tokens=3).token_ids == answer.token_ids


def test_threads_take_short_turns_while_weights_are_read_and_no_longer(monkeypatch):
    usual, turns, load = sys.getswitchinterval(), [], loading_module.load_params

    def recorded_load(*args, **options):
        turns.append(sys.getswitchinterval())
        return load(*args, **options)

    monkeypatch.setattr(loading_module, "load_params", recorded_load)
    with loading_model(HF / "llama3") as loading:
        loading.model()
        assert sys.getswitchinterval() == usual
    assert turns == [pytest.approx(TURN_SECONDS)]


@pytest.mark.once
def test_what_answers_without_precomputing_is_compiled_too_and_then_nothing_is_stored():
    prompt = random_prompt(0, chunk_lengths=(30, 40, 30))
    model, store = cb.load_model(HF / "llama3"), cb.ChunkStore()
    with cb.Engine(model, store, BLEND, store_missing=False) as engine:
        engine.precompute([prompt.chunks[1]], prefix=prompt.prefix)  # it is there, the others are not
        precomputing = model.runner.count
        engine.prepare(prompt, max_new_tokens=3, precomputed=False)
        compiled = model.runner.count
        assert precomputing < compiled
        stored = set(store.keys())
        answer = engine.generate(prompt, max_new_tokens=3)
        engine.flush()
        assert (answer.stats.prefill.hits, answer.stats.prefill.misses) == (1, 2)
        assert model.runner.count == compiled
        assert set(store.keys()) == stored


def test_compiling_without_weights_skips_what_is_stored():
    prompt = random_prompt(0)
    store = cb.ChunkStore()
    model = cb.load_model(HF / "llama3")
    with cb.Engine(model, store) as engine:
        engine.precompute(prompt)
    with loading_model(HF / "llama3") as loading, cb.Engine(loading.outline, store) as ahead:
        ahead.prepare(prompt, ())
        assert loading.outline.runner.count == 0


def test_weights_that_nobody_waits_for_are_not_read(monkeypatch):
    ended, entered = [], threading.Event()

    def load_for_long(_checkpoint, _config, progress):
        deadline = time.monotonic() + SECONDS
        try:
            while time.monotonic() < deadline:
                progress(0, 1)
                entered.set()
        except Exception as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr(loading_module, "load_params", load_for_long)
    with loading_model(HF / "llama3"):
        assert entered.wait(SECONDS)
    assert ended == ["_AbandonedError"]


def test_weights_that_cannot_be_read_are_said_when_they_are_waited_for(monkeypatch):
    def fail(*_, **__):
        raise cb.CheckpointError("model.safetensors: damaged")

    monkeypatch.setattr(loading_module, "load_params", fail)
    with loading_model(HF / "llama3") as loading, pytest.raises(cb.CheckpointError, match="damaged"):
        loading.model()
