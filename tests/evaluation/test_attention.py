"""What a prefill's attention was like: its distance from full recompute's, and what parts of a prompt paid to parts."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_engine, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.evaluation.attention import attention_between_parts, attention_deviation_by_layer
from cacheblend_jax.evaluation.corpus import Difficulty, examples
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.transformer import embedder, layer_at
from pallas_kernels import apply_rope

LENGTHS = (9, 30, 40, 1, 25, 7)  # of random_prompt's parts


def test_attention_deviation_is_that_of_reuse_and_none_of_the_true_cache():
    demo = cb.load_model("demo", dtype="float32")
    engine = cb.Engine(demo)
    example = examples("reference", 1, 4, Difficulty((6, 6), (32, 34)))[0]
    prompt = cb.Prompt.to_answer(demo.tokenizer, example.chunks, example.question.text)
    engine.precompute(prompt)
    full, reuse = engine.prefill(prompt, "full"), engine.prefill(prompt, "reuse")
    first = full.token_ids.size - len(prompt.suffix)

    def deviation(out):
        return attention_deviation_by_layer(demo, full.token_ids, first, out.padded_cache, full.padded_cache)

    np.testing.assert_array_equal(deviation(full), 0.0)
    measured = deviation(reuse)
    assert measured[0] == pytest.approx(0, abs=1e-5)  # keys of layer 0 depend on the token alone
    assert (measured[2:] > 1e-3).all()


def test_attention_deviation_has_the_models_scale():
    """A scale of scores twice as large is the same as queries twice as large."""
    engine, prompt = fresh_engine("llama2"), random_prompt(1)
    engine.precompute(prompt)
    full, reuse = engine.prefill(prompt, "full"), engine.prefill(prompt, "reuse")
    model, params = engine.model, engine.model.params
    doubled = params.layers | {"q_proj": jax.tree.map(lambda kernel: 2 * kernel, params.layers["q_proj"])}
    scaled = replace(model, config=replace(model.config, attention_scale=2 * model.config.head_dim**-0.5))
    one, other, plain = (
        attention_deviation_by_layer(each, full.token_ids, 105, reuse.padded_cache, full.padded_cache)
        for each in (scaled, replace(model, params=replace(params, layers=doubled)), model)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one - plain).max() > 1e-3


@pytest.fixture(scope="module")
def prefills() -> dict[str, cb.PrefillResult]:
    """One prompt in every mode, by a model whose windows are shorter than the prompt in half of its layers."""
    engine, prompt = fresh_engine("qwen2"), random_prompt(2)
    engine.precompute(prompt)
    return {mode: engine.prefill(prompt, mode) for mode in ("full", "reuse", "blend")}


@pytest.fixture(scope="module")
def between(prefills) -> dict[str, np.ndarray]:
    model = fresh_engine("qwen2").model
    return {mode: attention_between_parts(model, out, LENGTHS) for mode, out in prefills.items()}


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "soft cap and sinks"])
def test_attention_between_parts_is_that_of_the_attention_matrix(prefills, capped):
    """Of the first layer, whose queries and keys depend on the tokens alone."""
    model, full = fresh_engine("qwen2").model, prefills["full"]
    token_ids, sinks = full.token_ids, np.full((6, 4), -np.inf)
    if capped:
        config = replace(model.config, attention_soft_cap=1.5, attention_sinks=True)
        sinks = np.linspace(-1, 4, 24).reshape(6, 4)
        params = replace(model.params, layers=model.params.layers | {"sinks": jnp.asarray(sinks, jnp.float32)})
        model = replace(model, config=config, params=params)
    layer, config = layer_at(model.params, model.config, 0), model.config
    q, k, _ = layer.queries_keys_values(embedder(model.params, config).embed(jnp.asarray(token_ids)))
    angles = rope_tables(config, token_ids.size).of_layer(config, 0)
    q, k = (np.asarray(apply_rope(x, *angles), np.float64) for x in (q, k))
    k = np.repeat(k, config.num_heads // config.num_kv_heads, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5
    scores = 1.5 * np.tanh(scores / 1.5) if capped else scores
    scores[:, ~np.tri(token_ids.size, dtype=bool)] = -np.inf
    weights = np.exp(scores)
    weights = (weights / (weights.sum(-1, keepdims=True) + np.exp(sinks[0])[:, None, None])).mean(axis=0)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    wanted = np.add.reduceat(np.add.reduceat(weights, starts, axis=0), starts, axis=1) / np.array(LENGTHS)[:, None]
    np.testing.assert_allclose(attention_between_parts(model, full, LENGTHS)[0], wanted, atol=1e-5)


def test_full_recompute_pays_all_of_its_attention_to_what_stands_before(between):
    full = between["full"]
    assert full.shape == (5, 6, 6)  # the last of six layers is left out
    np.testing.assert_allclose(full.sum(axis=2), 1, atol=1e-5)
    assert not np.triu(full, 1).any()


def test_reuse_pays_none_between_chunks_and_a_blend_some(prefills, between):
    chunks = slice(1, 5)
    assert not between["reuse"][:, chunks].any()
    np.testing.assert_allclose(between["reuse"][:, -1].sum(axis=1), 1, atol=1e-5)  # the question is computed
    # Up to the check layer, a blend computes all tokens; whom it drops there attends no more.
    np.testing.assert_allclose(between["blend"][:1, chunks], between["full"][:1, chunks], atol=1e-5)
    paid = between["blend"][:, chunks].sum(axis=2)
    survivors = prefills["blend"].recomputed[1:].astype(np.float64)
    parts = np.repeat(np.arange(6), LENGTHS)
    shares = np.array([[row[parts == part].mean() for part in range(1, 5)] for row in survivors])
    np.testing.assert_allclose(paid, shares, atol=1e-5)
    assert 0 < paid[-1].mean() < 0.5
