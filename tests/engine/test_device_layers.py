"""Layers that stay on the device: a hit sends nothing and changes nothing; bytes are bounded, and given back."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine import groups
from cacheblend_jax.engine.device_layers import DeviceLayers, free_share
from cacheblend_jax.model import LayerKV
from cacheblend_jax.model.kv_cache import with_room
from cacheblend_jax.runtime.link import SimulatedLink

LAYERS, LAYER_BYTES = 6, 2 * 128 * 2 * 8 * 4  # K and V of a prompt of 97 to 128 tokens


@pytest.fixture(autouse=True)
def one_lane(monkeypatch):
    """As on an accelerator, where alone layers stay: each lane of a CPU would keep its own."""
    monkeypatch.setattr(groups, "num_lanes", lambda model: 1)


class Counting(SimulatedLink):
    """A link that counts the layers that go over it."""

    def __init__(self) -> None:
        super().__init__(1e12)
        self.layers = 0

    def put(self, tree, placement):
        self.layers += sum(leaf.nbytes for leaf in tree) // LAYER_BYTES
        return super().put(tree, placement)

    def sent(self) -> int:
        count, self.layers = self.layers, 0
        return count


def engine_with(room: float, **options) -> tuple[cb.Engine, Counting]:
    """An engine that keeps so many layers."""
    link = Counting()
    kept_bytes = int(room * LAYER_BYTES)
    return cb.Engine(family_model("llama3"), None, TWO_STAGES, link=link, kept_bytes=kept_bytes, **options), link


@pytest.mark.parametrize(("room", "second"), [(0, 6), (2, 4), (2.9, 4), (6, 0), (100, 0)])
def test_what_stays_is_not_sent_again_and_the_answer_is_the_same(room, second):
    engine, link = engine_with(room)
    prompt = random_prompt(5)
    with engine:
        engine.precompute(prompt)
        first = engine.prefill(prompt)
        assert link.sent() == LAYERS
        for _ in range(2):
            again = engine.prefill(prompt)
            assert link.sent() == second
            np.testing.assert_array_equal(again.logits, first.logits)
            np.testing.assert_array_equal(again.cache.k, first.cache.k)
        other = cb.Prompt(prompt.prefix, prompt.chunks, prompt.suffix[::-1].copy())  # another question
        engine.prefill(other)
        assert link.sent() == second


def test_a_pass_of_the_question_finds_the_layers_too():
    link = Counting()
    blend = cb.BlendConfig(0.3, "query", num_stages=2)
    model, prompt = family_model("qwen2"), random_prompt(3)
    with (
        cb.Engine(model, None, blend, executor="resident") as resident,
        cb.Engine(model, resident.store, blend, link=link, kept_bytes=10**9) as engine,
    ):
        resident.precompute(prompt)
        wanted = resident.prefill(prompt)
        for sent in (LAYERS, 0):
            out = engine.prefill(prompt)
            assert relative_error(out.logits, wanted.logits) < 2e-6
            assert link.sent() <= 2 * sent


def test_other_places_are_another_placement_and_the_least_recent_goes():
    engine, link = engine_with(2 * LAYERS)
    prompt = random_prompt(5)
    first, *others = prompt.chunks
    turned = cb.Prompt(prompt.prefix, [*others, first], prompt.suffix)
    fewer = cb.Prompt(prompt.prefix, others, prompt.suffix)
    with engine:
        engine.precompute(prompt)
        for each, sent in ((prompt, 6), (turned, 6), (prompt, 0), (turned, 0)):
            engine.prefill(each)
            assert link.sent() == sent
        engine.prefill(fewer)
        link.sent()
        engine.prefill(turned)
        assert link.sent() == 0  # used last of the two
        assert engine._groups.first.delivery._kept.num_bytes <= 2 * LAYERS * LAYER_BYTES


def exhausted(times: int):
    """Makes the next calls of a function fail as a device without memory does."""
    left = [times]

    def around(function):
        def call(*args, **kwargs):
            if left[0]:
                left[0] -= 1
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
            return function(*args, **kwargs)

        return call

    return around


def test_what_stays_gives_way_to_a_prefill_once(monkeypatch, caplog):
    engine, link = engine_with(100)
    prompt = random_prompt(5)
    with engine:
        engine.precompute(prompt)
        wanted = engine.prefill(prompt)
        executors = engine._groups.first
        monkeypatch.setattr(executors, "_run_streamed", exhausted(1)(executors._run_streamed))
        link.sent()
        out = engine.prefill(prompt)
        np.testing.assert_array_equal(out.logits, wanted.logits)
        assert link.sent() == LAYERS  # they were dropped
        assert caplog.text.count("ran out of memory") == 1
        engine.prefill(prompt)
        assert link.sent() == LAYERS  # the repeated prefill kept nothing
        engine.prefill(prompt)
        assert link.sent() == 0
        monkeypatch.setattr(executors, "_run_streamed", exhausted(2)(executors._run_streamed))
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            engine.prefill(prompt)
        monkeypatch.setattr(executors, "_run_streamed", exhausted(1)(executors._run_streamed))
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):  # nothing is left to give
            engine.prefill(prompt)


def test_what_stays_gives_way_to_storing_a_chunk(monkeypatch):
    engine, _ = engine_with(100)
    prompt = random_prompt(5)
    with engine:
        engine.precompute(prompt)
        engine.prefill(prompt)
        executors = engine._groups.first
        monkeypatch.setattr(executors.alone, "_kv_of", exhausted(1)(executors.alone._kv_of))
        assert engine.precompute(random_prompt(6)).unstored == []
        assert not executors.delivery._kept.num_bytes


def test_what_stays_gives_way_to_decoding(monkeypatch, caplog):
    engine, link = engine_with(100)
    prompt = random_prompt(5)
    with engine:
        engine.precompute(prompt)
        wanted = engine.generate(prompt, max_new_tokens=3).token_ids
        out = engine.prefill(prompt)
        for entry in [each for each in engine.model.runner._entries.values() if each.key[0] is with_room]:
            failing, program = Future(), entry.program.result()
            failing.set_result(replace(program, run=exhausted(1)(program.run)))
            monkeypatch.setattr(entry, "program", failing)
        assert engine.complete(out, max_new_tokens=3).token_ids == wanted
        assert caplog.text.count("ran out of memory") == 1
        link.sent()
        engine.prefill(prompt)
        assert link.sent() == LAYERS


def test_a_closed_engine_keeps_nothing():
    engine, link = engine_with(100)
    prompt = random_prompt(5)
    with engine:
        engine.precompute(prompt)
        engine.prefill(prompt)
    link.sent()
    engine.prefill(prompt)
    assert link.sent() == LAYERS
    engine.close()


def test_only_a_share_of_free_memory_is_taken():
    def device(in_use):
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": in_use})

    assert free_share([device(100), device(200)], needed=150) == 200
    assert free_share([device(100)], needed=500) == 125
    assert free_share([device(100)], needed=2000) == 0
    assert free_share(jax.devices("cpu"), needed=0) == 0


def test_capacity_halves_when_it_gives_way():
    layers = DeviceLayers(4)
    kv = LayerKV(jax.numpy.zeros((1, 1, 1)), jax.numpy.zeros((1, 1, 1)))
    placed = layers.of("a", 1, 6)
    assert [placed.keep(layer, kv) for layer in (0, 0, 3, 4)] == [True, False, True, False]
    assert layers.num_kept("a") == 2
    assert layers.of("a", 1, 6) is placed
    assert layers.drop()
    assert layers.num_kept("a") == 0
    assert layers.of("a", 1, 6).room == 0
    assert layers.of("a", 1, 6).room == 2
    assert not DeviceLayers(4).drop()


@pytest.mark.parametrize("kept_bytes", [-1, 1.5, True])
def test_a_capacity_that_makes_no_sense_is_named(kept_bytes):
    with pytest.raises(cb.CacheBlendError, match="kept_bytes must be None or a whole number of at least 0"):
        cb.Engine(family_model("llama3"), kept_bytes=kept_bytes)
