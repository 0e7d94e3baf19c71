"""The context: what chunks are precomputed after, of the prompt's prefix and of a text that is the same for all."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, HF, TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine.standalone import SHARED_CONTEXT
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
    alone = engine._groups.first.alone
    kv_of = alone._kv_of
    monkeypatch.setattr(alone, "_kv_of", lambda ids, *more: computed.append(ids.size) or kv_of(ids, *more))
    engine.precompute(random_prompt(42, (30, 40, 25)))
    assert sorted(computed) == sorted([9, 4 + TEXT.size, 30, 40, 25])  # the prefix, the context, the chunks


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
    with cb.ChunkStore(tmp_path) as later, cb.Engine(model, later, TWO_STAGES) as engine:
        assert engine.prefill(cb.Prompt("", ["Grass is green."], "?")).stats.hits == 1
        assert context_of(cb.Engine(model, later, context="Snow is white.")) == "Snow is white."  # said here


def fitted(family: str, tokens: int = 5) -> cb.FittedContext:
    model = family_model(family)
    rows = np.random.default_rng(50).normal(size=(tokens, model.config.hidden_size)).astype(np.float32)
    return cb.FittedContext.of(model, 0.02 * rows)


@pytest.mark.parametrize("tokens", [5, SHARED_CONTEXT + 2])
def test_embeddings_that_are_those_of_a_text_do_what_the_text_does(tokens):
    model, prompt = family_model("gemma3"), random_prompt(51)  # its embeddings are scaled
    ids = TEXT[:tokens]
    as_read = model.params.embedder["embedding"][ids] * np.float32(model.config.embedding_scale)
    context = cb.FittedContext(np.asarray(as_read), model.weights_digest)  # not rounded
    assert (context.token_ids < 0).all()
    of_text, of_embeddings = (engine_with(each, "gemma3") for each in (ids, context))
    for key, wanted in zip(of_embeddings.precompute(prompt), of_text.precompute(prompt), strict=True):
        entry, expected = of_embeddings.store.get(key), of_text.store.get(wanted)
        assert key != wanted
        assert relative_error(entry.k, expected.k) < 1e-6
        assert relative_error(entry.v, expected.v) < 1e-6
        assert entry.context_ids[4:] == tuple(context.token_ids.tolist())
    assert relative_error(of_embeddings.prefill(prompt).logits, of_text.prefill(prompt).logits) < 1e-6


def test_warm_up_covers_a_fitted_context():
    engine = engine_with(fitted("llama3"), length_buckets=(128,))
    engine.warmup(128, prefix_tokens=9, suffix_tokens=7, chunk_tokens=40)
    compiled = engine.model.runner.count
    engine.precompute(random_prompt(46))
    assert engine.model.runner.count == compiled


def test_a_fitted_context_is_kept_in_a_file_and_serves_its_own_model_alone(tmp_path):
    context, path = fitted("llama3"), tmp_path / "fitted.safetensors"
    context.save(path)
    again = cb.FittedContext.load(path)
    np.testing.assert_array_equal(again.token_ids, context.token_ids)
    assert len(set(context.token_ids.tolist())) == 5
    assert engine_with(again).precompute(random_prompt(52)) == engine_with(context).precompute(random_prompt(52))
    with pytest.raises(cb.CacheBlendError, match="was fitted to another model than 'random'; fit one to it"):
        cb.Engine(cb.model.random_model(FAMILIES["llama3"], seed=8), context=again)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for name, why in (("other", "is not a fitted context"), ("none", "cannot be read")):
        with pytest.raises(cb.CacheBlendError, match=why):
            cb.FittedContext.load(tmp_path / f"{name}.safetensors")


def test_a_packaged_context_serves_the_model_that_it_was_fitted_to(tmp_path, monkeypatch):
    from cacheblend_jax.engine import contexts

    (packaged,) = contexts.PACKAGED.iterdir()
    assert cb.FittedContext.load(packaged).embeddings.shape == (64, 576)  # SmolLM2's
    context = fitted("llama3")
    context.save(tmp_path / "fitted.safetensors")
    monkeypatch.setattr(contexts, "PACKAGED", tmp_path)
    store = cb.ChunkStore()
    by_default, named = (cb.Engine(family_model("llama3"), store, **more) for more in ({}, {"context": context}))
    assert by_default.precompute(random_prompt(53)) == named.precompute(random_prompt(53))
    assert len(store) == 5
