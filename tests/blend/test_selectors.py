"""Selectors: what they measure, checked against direct computation, and what they choose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import family_model, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.blend import selectors
from cacheblend_jax.blend.deviation import kv_deviation
from cacheblend_jax.blend.layer_step import highest
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.transformer import embedder, layer_at
from pallas_kernels import apply_rope

CHECK, NUM_LAYERS = 2, 6
PREFIX, LENGTHS, SUFFIX = 9, (30, 40, 25), 7
TOTAL = PREFIX + sum(LENGTHS) + SUFFIX
# Its layers differ in window and RoPE, and its attention has a scale, caps and sinks.
FAMILY = "gemma3_capped"


def blend_engine(selector: str, ratio: float = 0.2, family: str = "llama3", **options) -> cb.Engine:
    blend = cb.BlendConfig(ratio, selector=selector, check_layer=CHECK, **{"num_stages": 1} | options)
    return cb.Engine(family_model(family), blend=blend)


def the_prompt() -> cb.Prompt:
    return random_prompt(31, LENGTHS, PREFIX, SUFFIX)


def chosen_after_check(engine: cb.Engine, prompt: cb.Prompt) -> np.ndarray:
    """Candidates computed at the first layer after the check layer."""
    engine.precompute(prompt)
    recomputed = engine.prefill(prompt).recomputed[CHECK + 1]
    return np.flatnonzero(recomputed[PREFIX:-SUFFIX]) + PREFIX


def top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores[PREFIX:-SUFFIX], kind="stable")[:count]) + PREFIX


def weights_of(layer, config, scores: jnp.ndarray, visible: np.ndarray) -> jnp.ndarray:
    """Attention's weights [heads, q, k], with the layer's sinks as the scores of one more key."""
    if config.attention_soft_cap is not None:
        scores = config.attention_soft_cap * jnp.tanh(scores / config.attention_soft_cap)
    scores = jnp.where(visible[None], scores, -jnp.inf)
    if layer.sinks is not None:
        sinks = jnp.broadcast_to(layer.sinks[...][:, None, None], (*scores.shape[:2], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    return jax.nn.softmax(scores, axis=-1)[..., : visible.shape[1]]


@functools.cache  # operation by operation it is slow to compile
def forward(family: str) -> list[dict[str, np.ndarray]]:
    """A dense full prefill of the prompt in plain jnp: each layer's k (before RoPE), v, and weights [heads, q, k]."""
    model, prompt = family_model(family), the_prompt()
    token_ids = np.concatenate([prompt.prefix, *prompt.chunks, prompt.suffix])
    config, params = model.config, model.params
    hidden = embedder(params, config).embed(jnp.asarray(token_ids))
    angles, scale = rope_tables(config, token_ids.size), config.attention_scale or config.head_dim**-0.5
    distance = np.arange(token_ids.size)[:, None] - np.arange(token_ids.size)
    group = config.num_heads // config.num_kv_heads
    layers = []
    for index in range(config.num_layers):
        layer = layer_at(params, config, index)
        k, v = layer.keys_values(hidden)
        q, turned = (apply_rope(x, *angles.of_layer(config, index)) for x in (layer.queries(hidden), k))
        scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(turned, group, 1)) * scale
        visible = (distance >= 0) & (distance < (config.windows[index] or TOTAL))
        weights = weights_of(layer, config, scores, visible)
        hidden = layer.finish(hidden, jnp.einsum("hqk,khd->qhd", weights, jnp.repeat(v, group, 1)))
        layers.append({"k": np.asarray(k), "v": np.asarray(v), "weights": np.asarray(weights)})
    return layers


def stored(engine: cb.Engine, prompt: cb.Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Stand-alone K, V of the whole prompt, zeros at the suffix."""
    config = engine.model.config
    shape = (config.num_layers, TOTAL, config.num_kv_heads, config.head_dim)
    k, v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    start = PREFIX
    for key, chunk in zip(engine.precompute(prompt), prompt.chunks, strict=True):
        entry = engine.store.get(key)
        k[:, start : start + len(chunk)], v[:, start : start + len(chunk)] = entry.k, entry.v
        start += len(chunk)
    return k, v


@pytest.mark.parametrize("part", ["kv", "k", "v"])
def test_hkvd_picks_the_highest_kv_deviation_at_the_check_layer(part):
    engine, prompt = blend_engine("hkvd", deviation=part), the_prompt()
    chosen = chosen_after_check(engine, prompt)
    k, v = stored(engine, prompt)
    full = forward("llama3")[CHECK]
    scores = np.zeros(TOTAL)
    active = np.arange(TOTAL) >= PREFIX
    for name, fresh, cached in (("k", full["k"], k[CHECK]), ("v", full["v"], v[CHECK])):
        if name in part:
            mean_norm = np.square(fresh[active]).sum((1, 2)).mean()
            scores += np.square(fresh - cached).sum((1, 2)) / mean_norm
    np.testing.assert_array_equal(chosen, top(scores, len(chosen)))
    assert 0.2 * sum(LENGTHS) <= len(chosen) <= 0.25 * sum(LENGTHS)


@pytest.mark.parametrize("family", ["llama3", FAMILY])
def test_cross_picks_what_looked_at_other_chunks_in_the_layer_before_the_check(family):
    engine, prompt = blend_engine("cross", family=family), the_prompt()
    chosen = chosen_after_check(engine, prompt)
    mean_weights = forward(family)[CHECK - 1]["weights"].mean(0)
    scores = np.zeros(TOTAL)
    start = PREFIX
    for length in LENGTHS:
        own = np.zeros(TOTAL, bool)
        own[start : start + length] = True
        own[:4] = True  # the context that chunks were computed after
        scores[start : start + length] = mean_weights[start : start + length, ~own].sum(1)
        start += length
    np.testing.assert_array_equal(chosen, top(scores, len(chosen)))


@pytest.mark.parametrize("family", ["llama3", FAMILY])  # the default runs without windows and caps, too
def test_query_picks_first_tokens_then_by_the_questions_attention_over_cached_kv_times_deviation(family):
    engine, prompt = blend_engine("query", family=family), the_prompt()
    chosen = chosen_after_check(engine, prompt)
    full = forward(family)[CHECK]
    k, v = stored(engine, prompt)
    deviation = np.zeros(TOTAL)
    active = np.arange(TOTAL) >= PREFIX
    for fresh, cached in ((full["k"], k[CHECK]), (full["v"], v[CHECK])):
        deviation += np.square(fresh - cached).sum((1, 2)) / np.square(fresh[active]).sum((1, 2)).mean()
    scores = question_attention(engine, prompt) * deviation
    firsts = PREFIX + np.cumsum([0, *LENGTHS[:-1]])
    assert not set(firsts) <= set(top(scores, len(chosen)))  # they are not chosen by their scores alone
    scores[firsts] = np.inf
    np.testing.assert_array_equal(chosen, top(scores, len(chosen)))


def question_attention(engine: cb.Engine, prompt: cb.Prompt) -> np.ndarray:
    """Attention of the question to every token, summed over layers and heads, in a pass over full KV reuse."""
    model = engine.model
    config, params = model.config, model.params
    cache = engine.prefill(prompt, "reuse").cache
    scale = config.attention_scale or config.head_dim**-0.5
    group = config.num_heads // config.num_kv_heads
    hidden = embedder(params, config).embed(jnp.asarray(prompt.suffix))
    total = np.zeros(TOTAL)
    positions = jnp.arange(TOTAL - SUFFIX, TOTAL)
    angles = rope_tables(config, TOTAL).take(positions)
    for index in range(config.num_layers):
        layer = layer_at(params, config, index)
        q = apply_rope(layer.queries(hidden), *angles.of_layer(config, index))
        k, v = (jnp.repeat(x[index], group, 1) for x in (cache.k, cache.v))
        scores = jnp.einsum("qhd,khd->hqk", q, k) * scale
        distance = np.asarray(positions)[:, None] - np.arange(TOTAL)
        visible = (distance >= 0) & (distance < (config.windows[index] or TOTAL))
        weights = weights_of(layer, config, scores, visible)
        total += np.asarray(weights.sum((0, 1)))
        hidden = layer.finish(hidden, jnp.einsum("hqk,khd->qhd", weights, v))
    return total


def test_oracle_picks_the_true_deviation_over_all_layers():
    engine, prompt = blend_engine("oracle", family=FAMILY), the_prompt()
    chosen = chosen_after_check(engine, prompt)
    layers = forward(FAMILY)
    k, v = stored(engine, prompt)
    # Forced tokens have no stored KV, and the prefix's is exact: only the candidates are compared.
    scores = np.zeros(TOTAL)
    for index, layer in enumerate(layers):
        for fresh, cached in ((layer["k"], k[index]), (layer["v"], v[index])):
            scores += np.square(fresh - cached).sum((1, 2)) / np.square(fresh).sum((1, 2)).mean()
    np.testing.assert_array_equal(chosen, top(scores, len(chosen)))


def test_epic_picks_the_first_tokens_of_each_chunk():
    chosen = chosen_after_check(blend_engine("epic"), the_prompt())
    starts = PREFIX + np.cumsum([0, *LENGTHS[:-1]])
    places = chosen - starts[np.searchsorted(starts, chosen, side="right") - 1]
    counts = np.bincount(np.searchsorted(starts, chosen, side="right") - 1)
    assert places.max() < counts.max()
    assert counts.max() - counts.min() <= 1


def test_random_follows_its_seed():
    prompt = the_prompt()
    one, same, other = (chosen_after_check(blend_engine("random", seed=seed), prompt) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_filtering_is_gradual_and_nested():
    engine, prompt = blend_engine("hkvd", ratio=0.3, num_stages=4), the_prompt()
    engine.precompute(prompt)
    recomputed = engine.prefill(prompt).recomputed[:, PREFIX:-SUFFIX]
    counts = recomputed.sum(1)
    assert (recomputed[1:] <= recomputed[:-1]).all()
    assert counts[CHECK] == sum(LENGTHS)
    assert counts[CHECK + 1] > counts[-1]
    assert counts[CHECK + 1 :].mean() / sum(LENGTHS) == pytest.approx(0.3, abs=0.01)


def test_a_selector_of_ones_own():
    cb.register_selector("last_tokens", lambda evidence: evidence.positions.astype(jnp.float32))
    try:
        chosen = chosen_after_check(blend_engine("last_tokens"), the_prompt())
        np.testing.assert_array_equal(chosen, np.arange(TOTAL - SUFFIX - len(chosen), TOTAL - SUFFIX))
        with pytest.raises(cb.CacheBlendError, match="exists already"):
            cb.register_selector("last_tokens", lambda evidence: evidence.index)
    finally:
        del selectors._registered["last_tokens"]
    with pytest.raises(TypeError):
        cb.SELECTORS["mine"] = cb.SELECTORS["hkvd"]  # read-only: nothing can be replaced unnoticed
    engine, column = blend_engine("hkvd"), cb.Selector("column", lambda evidence: evidence.positions[:, None])
    engine.precompute(the_prompt())
    with pytest.raises(cb.CacheBlendError, match=r"selector 'column' must return one score per token, \[\d+\], got"):
        engine.prefill(the_prompt(), blend=cb.BlendConfig(0.2, column))
    with pytest.raises(cb.CacheBlendError, match="unknown evidence 'logits'"):
        cb.register_selector("other", lambda evidence: evidence.index, frozenset({"logits"}))


SIZES = (1, 2, 7, 30)  # few, since each is compiled
highest_of = jax.jit(highest, static_argnums=4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.integers(0, 2**16))
def test_highest_keeps_forced_rows_then_the_best_in_order(size, room, seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 1.0, 2.0, np.nan, np.inf], size).astype(np.float32)
    valid = rng.random(size) < 0.8
    forced = (rng.random(size) < 0.2) & valid
    room = min(next(each for each in SIZES if each >= max(room, forced.sum())), size)  # forced rows always fit
    keep = int(rng.integers(forced.sum(), room + 1))
    survivors = highest_of(scores, forced, valid, np.int32(keep), room)
    kept = np.asarray(survivors.indices)[np.asarray(survivors.valid)]
    clean = np.nan_to_num(scores, nan=0.0, posinf=1e30)
    order = sorted(np.flatnonzero(valid), key=lambda i: (not forced[i], -clean[i], i))
    assert kept.tolist() == sorted(order[:keep])


def test_deviation_weighs_k_and_v_alike():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((5, 2, 4)) * scale, jnp.float32) for scale in (100.0, 0.01))
    k_cached, v_cached = k.at[1].mul(1.1), v.at[2].mul(1.1)
    valid = jnp.arange(5) < 4
    deviation = np.asarray(kv_deviation(k, v, k_cached, v_cached, valid))
    assert deviation[0] == deviation[3] == 0
    norms = [np.square(np.asarray(x)).sum((1, 2)) for x in (k, v)]
    assert deviation[1] == pytest.approx(0.01 * norms[0][1] / norms[0][:4].mean(), rel=1e-3)
    assert deviation[2] == pytest.approx(0.01 * norms[1][2] / norms[1][:4].mean(), rel=1e-3)
