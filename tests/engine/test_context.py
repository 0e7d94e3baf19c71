"""The context: what chunks are precomputed after, of the prompt's prefix and of a text that is the same for all."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HF, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine.executors import SHARED_CONTEXT
from cacheblend_jax.model.rope import rope_tables
from pallas_kernels import apply_rope

TEXT = np.random.default_rng(40).integers(0, 97, SHARED_CONTEXT + 9).astype(np.int32)


def engine_with(context, family="llama3", ratio=0.15, **options) -> cb.Engine:
    return cb.Engine(family_model(family), blend=cb.BlendConfig(ratio, num_stages=2), context=context, **options)


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3"])
def test_chunks_have_the_kv_of_a_prefill_of_their_context_and_them(family):
    engine, prompt = engine_with(TEXT, family), random_prompt(41)
    keys = engine.precompute(prompt)
    before = np.concatenate([prompt.prefix[:4], TEXT])
    for key, ids in zip(keys, prompt.chunks, strict=True):
        entry = engine.store.get(key)
        whole = engine.prefill(cb.Prompt([], [], np.concatenate([before, ids])), "full").cache
        assert entry.context_ids == tuple(before.tolist())
        assert relative_error(entry.v, whole.v[:, before.size :]) < 1e-5
        angles = rope_tables(engine.model.config, before.size + ids.size)
        for layer in range(engine.model.config.num_layers):
            cos, sin = (x[before.size :] for x in angles.of_layer(engine.model.config, layer))
            rotated = apply_rope(jnp.asarray(entry.k[layer]), cos, sin)
            assert relative_error(rotated, whole.k[layer, before.size :]) < 1e-5


def test_a_context_that_many_chunks_share_is_computed_once(monkeypatch):
    engine, computed = engine_with(TEXT), []
    kv_of = engine._executors._kv_of
    monkeypatch.setattr(engine._executors, "_kv_of", lambda ids, *more: computed.append(ids.size) or kv_of(ids, *more))
    engine.precompute(random_prompt(42, (30, 40, 25)))
    assert computed == [9, 4 + TEXT.size, 30, 40, 25]  # the prefix, the context, the chunks


def test_a_blend_that_recomputes_all_is_full_prefill():
    engine, prompt = engine_with(TEXT, ratio=1.0), random_prompt(43)
    engine.precompute(prompt)
    out, full = engine.prefill(prompt), engine.prefill(prompt, "full")
    assert (out.stats.hits, out.stats.exact) == (4, 9)  # the prefix alone
    assert relative_error(out.logits, full.logits) < 1e-5


def test_a_chunk_is_exact_only_after_the_very_tokens_of_its_context():
    # As many tokens stand before the first chunk as in its context, but others.
    engine, prompt = engine_with(TEXT[:6]), random_prompt(44, (20, 30), prefix=10)
    engine.precompute(prompt)
    out = engine.prefill(prompt)
    assert (out.stats.exact, out.stats.candidates) == (10, 50)
    same = random_prompt(44, (20, 30), prefix=10)
    same = cb.Prompt(np.concatenate([same.prefix[:4], TEXT[:6]]), same.chunks, same.suffix)
    out = engine.prefill(same)
    assert (out.stats.hits, out.stats.exact) == (2, 20)  # found, and right where they stand; the prefix is new


def test_chunks_after_another_context_are_other_entries():
    store, prompt = cb.ChunkStore(), random_prompt(45)
    first, second, plain = (engine_with(context, store=store) for context in (TEXT, TEXT[:-1], []))
    keys = [engine.precompute(prompt) for engine in (first, second, plain)]
    assert len({key for each in keys for key in each}) == 12
    assert second.prefill(prompt).stats.hits == 4


def test_warm_up_covers_chunks_after_a_shared_context():
    engine = engine_with(TEXT, length_buckets=(128,))
    engine.warmup(128, prefix_tokens=9, suffix_tokens=7, chunk_tokens=40)
    compiled = engine.model.runner.count
    engine.precompute(random_prompt(46))
    assert engine.prefill(random_prompt(46)).stats.compile_s == 0
    assert engine.model.runner.count == compiled


def test_a_context_is_text_or_ids_and_leaves_room():
    model = cb.load_model(HF / "llama3", dtype="float32")
    text = cb.Engine(model, context="The sky is blue.")
    (key,) = text.precompute(["Grass is green."])
    assert model.tokenizer.decode(list(text.store.get(key).context_ids)).endswith("The sky is blue.")
    with pytest.raises(cb.PromptError, match="the context with a chunk has 2053 tokens"):
        engine_with(np.zeros(2048, np.int32))
    with pytest.raises(cb.PromptError, match="context has token id 97"):
        engine_with([97])


def test_the_packaged_text_is_a_page():
    assert 300 < len(cb.neutral_text().split()) < 400


READER = HF / "llama3"  # a checkpoint with a tokenizer that reads any text


def context_of(engine: cb.Engine) -> str:
    (key,) = engine.precompute(["Grass is green."])
    return engine.model.tokenizer.decode(list(engine.store.get(key).context_ids)).removeprefix("<s>").strip()


def test_by_default_chunks_are_precomputed_after_the_neutral_text_where_the_model_reads_it(monkeypatch):
    model = cb.load_model(READER, dtype="float32")
    monkeypatch.setattr("cacheblend_jax.engine.contexts.neutral_text", lambda: "Rooms open at eight.")
    assert context_of(cb.Engine(model)) == "Rooms open at eight."
    assert context_of(cb.Engine(model, context="")) == ""
    assert context_of(cb.Engine(model, context_tokens=None)) == ""  # the whole prefix: first chunks are exact
    monkeypatch.undo()  # of the packaged text, letter by letter: it would leave chunks too little room
    assert context_of(cb.Engine(model)) == ""


def test_a_model_that_lacks_words_of_the_neutral_text_goes_without():
    engine = cb.Engine(cb.load_model("demo"))
    (key,) = engine.precompute(["Reyes took the nickname Cobalt."])
    assert len(engine.store.get(key).context_ids) == 1  # the opening


def test_the_text_that_a_store_remembers_comes_before_the_neutral_one(tmp_path):
    model = cb.load_model(READER, dtype="float32")
    with cb.ChunkStore(tmp_path) as store:
        assert store.remember_context("The sky is blue.") == "The sky is blue."
        with cb.Engine(model, store) as engine:
            assert context_of(engine) == "The sky is blue."
    with cb.ChunkStore(tmp_path) as later, cb.Engine(model, later) as engine:
        assert engine.prefill(cb.Prompt("", ["Grass is green."], "?")).stats.hits == 1
        assert context_of(cb.Engine(model, later, context="Snow is white.")) == "Snow is white."  # said here
