"""Stored KV becomes blended KV in the memory that it came in; where it has a buffer of its own, the same comes out."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.blend import resident, steps
from cacheblend_jax.engine import executors
from cacheblend_jax.runtime.programs import Runner


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_a_buffer_of_its_own_makes_no_difference(executor, monkeypatch):
    model, prompt, results = family_model("llama3"), random_prompt(3), []
    store = cb.ChunkStore()
    for in_place in (True, False):
        for module in (steps, resident, executors):
            if hasattr(module, "blends_in_place"):
                monkeypatch.setattr(module, "blends_in_place", lambda platform, in_place=in_place: in_place)
        monkeypatch.setitem(model.__dict__, "runner", Runner("cpu", model.placement))
        engine = cb.Engine(model, store, cb.BlendConfig(0.3, "query", num_stages=2), executor=executor)
        engine.precompute(prompt)
        results.append(engine.prefill(prompt))
        texts = "".join(model.runner.texts())
        assert executor == "streamed" or ("may-alias" in texts) == in_place
    one, other = results
    np.testing.assert_array_equal(one.recomputed, other.recomputed)
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    for name in ("k", "v"):
        np.testing.assert_allclose(getattr(one.cache, name), getattr(other.cache, name), rtol=1e-5, atol=1e-5)


def test_a_result_is_its_own_whatever_is_prefilled_next():
    # On a CPU, the device takes over host buffers without a copy, and the next request fills them again.
    engine = cb.Engine(family_model("llama3"), blend=cb.BlendConfig(0.3, "hkvd", num_stages=2), executor="resident")
    prompts = [random_prompt(seed) for seed in (4, 5)]
    for prompt in prompts:
        engine.precompute(prompt)
    out = engine.prefill(prompts[0])
    before = [np.array(x) for x in (out.cache.k, out.cache.v, out.padded_cache.k)]
    engine.prefill(prompts[1])
    for kept, wanted in zip((out.cache.k, out.cache.v, out.padded_cache.k), before, strict=True):
        np.testing.assert_array_equal(kept, wanted)
    assert np.array_equal(engine.prefill(prompts[0]).cache.k, before[0])  # nor does it change what is stored
