"""The invariants I1 to I7, of the resident executor, on every family; I8, of a trained model, is in evaluation/."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest
from conftest import FAMILIES, TWO_STAGES, family_model, fresh_engine, random_prompt, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.model.rope import rope_tables
from pallas_kernels import apply_rope

# Every selector on some family, and every family with some selector: those that read attention with sliding windows.
# The default runs on every family in I2 and I3, and in bfloat16.
SELECTOR_OF = {"llama2": "random", "llama3": "epic", "mistral": "cross", "qwen2": "query", "qwen3": "oracle"}
SELECTOR_OF |= {"gemma3": "hkvd", "every_option": "hkvd"}
each_selector = pytest.mark.parametrize(("family", "selector"), SELECTOR_OF.items(), scope="session")
IN_BFLOAT16 = ("qwen2", "gemma3", "every_option")  # all options, if not all values: such programs compile slowly


def test_every_selector_and_family_has_a_case():
    assert SELECTOR_OF.keys() == FAMILIES.keys()
    assert set(SELECTOR_OF.values()) == set(cb.SELECTORS)


def options_of(families) -> set[str]:
    """The fields of a configuration that one of these families has otherwise than the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(cb.model.ModelConfig)}
    return {name for family in families for name in defaults if getattr(FAMILIES[family], name) != defaults[name]}


def test_every_option_is_in_a_model_in_bfloat16():
    assert options_of(IN_BFLOAT16) == options_of(FAMILIES)


def assert_full(out, full, tolerance=1e-5):
    assert relative_error(out.logits, full.logits) < tolerance
    assert relative_error(out.cache.k, full.cache.k) < tolerance
    assert relative_error(out.cache.v, full.cache.v) < tolerance


def rotated(engine, entry_k, start):
    config = engine.model.config
    return _rotated(entry_k, rope_tables(config, 128), start, config=config)


@partial(jax.jit, static_argnames="config")  # operation by operation, hundreds would be compiled
def _rotated(k, angles, start, *, config):
    angles = angles.take(start + jax.numpy.arange(k.shape[1]))
    rotate = jax.vmap(lambda k, layer: apply_rope(k, *angles.of_layer(config, layer)))
    return rotate(k, jax.numpy.arange(config.num_layers))


def entries(engine, prompt):
    return [engine.store.get(key) for key in engine.precompute(prompt)]


def spans(prompt):
    start = len(prompt.prefix)
    for chunk in prompt.chunks:
        yield start, start + len(chunk)
        start += len(chunk)


@each_selector
def test_i1_ratio_one_is_full_prefill(family, selector):
    engine, prompt = fresh_engine(family, 1.0, selector), random_prompt(1)
    engine.precompute(prompt)
    assert_full(engine.prefill(prompt), engine.prefill(prompt, "full"))


@pytest.mark.parametrize("family", IN_BFLOAT16, scope="session")
def test_i1_bfloat16_within_rounding(family):
    model = cb.model.random_model(dataclasses.replace(FAMILIES[family], dtype="bfloat16"), seed=7)
    engine = cb.Engine(model, blend=cb.BlendConfig(1.0, num_stages=1))
    prompt = random_prompt(1, (28, 25, 1, 27))  # each with its context of one bucket: one program
    engine.precompute(prompt)
    out, full = engine.prefill(prompt), engine.prefill(prompt, "full")
    # Not the largest error: where what attention returned nearly cancels out, a norm after it enlarges its rounding.
    for one, other in ((out.logits, full.logits), (out.cache.k, full.cache.k), (out.cache.v, full.cache.v)):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


def test_i2_reuse_returns_what_is_stored(family):
    engine, prompt = fresh_engine(family), random_prompt(2)
    stored = entries(engine, prompt)
    out = engine.prefill(prompt, "reuse")
    assert out.stats.hits == 4
    for (start, stop), entry in zip(spans(prompt), stored, strict=True):
        np.testing.assert_array_equal(np.asarray(out.cache.v)[:, start:stop], entry.v)
        np.testing.assert_allclose(np.asarray(out.cache.k)[:, start:stop], rotated(engine, entry.k, start), atol=1e-6)
    assert not out.recomputed[:, 9:-7].any()


@pytest.mark.once
def test_i2_ratio_zero_is_reuse(family):
    engine, prompt = fresh_engine(family, 0.0), random_prompt(2)
    engine.precompute(prompt)
    reuse, blend = engine.prefill(prompt, "reuse"), engine.prefill(prompt)
    np.testing.assert_array_equal(reuse.logits, blend.logits)
    np.testing.assert_array_equal(reuse.cache.k, blend.cache.k)


# Each family with one ratio: each ratio has programs of its own.
RATIO_OF = {"llama2": 0.0, "llama3": 0.15, "mistral": 1.0, "qwen2": 0.0, "qwen3": 1.0}
RATIO_OF |= {"gemma3": 0.15, "every_option": 0.15}


@pytest.mark.parametrize(("family", "ratio"), RATIO_OF.items(), scope="session")
def test_i3_exact_chunk_is_prefix_caching(family, ratio):
    engine, prompt = fresh_engine(family, ratio, context_tokens=None), random_prompt(3)
    first = entries(engine, prompt)[0]
    start, stop = next(spans(prompt))
    out = engine.prefill(prompt)
    assert out.stats.exact == stop
    assert not out.recomputed[:, :stop].any()
    np.testing.assert_array_equal(np.asarray(out.cache.v)[:, start:stop], first.v)
    np.testing.assert_allclose(np.asarray(out.cache.k)[:, start:stop], rotated(engine, first.k, start), atol=1e-6)
    cached, full = engine.prefill(prompt, "prefix"), engine.prefill(prompt, "full")
    assert cached.stats.exact == stop
    assert_full(cached, full)


@pytest.mark.once
def test_i3_a_prefix_is_exact_after_its_first_use(family):
    engine, prompt = fresh_engine(family, 0.4, "epic"), random_prompt(4)  # whose programs I4 has
    assert engine.prefill(prompt).stats.exact == 0
    engine.flush()
    assert engine.prefill(prompt).stats.exact == 9


@pytest.mark.once
@pytest.mark.parametrize("mode", ["full", "reuse", "blend"])
def test_i4_a_later_token_never_changes_earlier_kv(family, mode):
    # `epic` selects by place alone: the recomputed sets stay as they are when a token changes.
    engine, prompt = fresh_engine(family, 0.4, "epic"), random_prompt(5)
    changed_suffix = prompt.suffix.copy()
    changed_suffix[3] = (changed_suffix[3] + 1) % 97
    changed_chunk = prompt.chunks[1].copy()
    changed_chunk[20] = (changed_chunk[20] + 1) % 97
    chunks = [prompt.chunks[0], changed_chunk, *prompt.chunks[2:]]
    out = _after_precompute(engine, prompt, mode)
    for changed, place in (
        (cb.Prompt(prompt.prefix, prompt.chunks, changed_suffix), 9 + 96 + 3),
        (cb.Prompt(prompt.prefix, chunks, prompt.suffix), 9 + 30 + 20),
    ):
        other = _after_precompute(engine, changed, mode)
        np.testing.assert_array_equal(out.recomputed, other.recomputed)
        np.testing.assert_array_equal(np.asarray(out.cache.k)[:, :place], np.asarray(other.cache.k)[:, :place])
        np.testing.assert_array_equal(np.asarray(out.cache.v)[:, :place], np.asarray(other.cache.v)[:, :place])
        assert not np.array_equal(np.asarray(out.cache.v)[:, place], np.asarray(other.cache.v)[:, place])


def _after_precompute(engine, prompt, mode):
    engine.precompute(prompt)
    return engine.prefill(prompt, mode)


@each_selector
def test_i5_question_and_missed_chunks_are_forced(family, selector):
    engine, prompt = fresh_engine(family, 0.15, selector), random_prompt(6)
    engine.precompute([prompt.chunks[0], prompt.chunks[3]], prefix=prompt.prefix)
    out = engine.prefill(prompt)
    (_, first), (_, second), (_, third), _ = spans(prompt)
    assert (out.stats.hits, out.stats.misses) == (2, 2)
    assert out.recomputed[:, first:third].all()
    assert second < third
    assert out.recomputed[:, -7:].all()
    assert not out.recomputed[:, :9].any()
    assert not out.recomputed[-1, 9:first].all()


@pytest.mark.parametrize("mode", ["prefix", "reuse", "blend"])
def test_i7_no_hits_is_exact(family, mode):
    engine, prompt = fresh_engine(family), random_prompt(7)
    assert_full(engine.prefill(prompt, mode), engine.prefill(prompt, "full"))


SHAPES = {  # all but one of 33 to 64 tokens, which share their programs
    "no chunks": ((), 30, 7),
    "no prefix": ((15, 20), 0, 7),
    "no suffix": ((15, 20), 9, 0),
    "chunks alone": ((15, 20), 0, 0),
    "one token chunks": ((1, 1, 1), 30, 1),
    "one token": ((), 0, 1),
    "prefix alone": ((), 40, 0),
    "prefix shorter than the context": ((15, 20), 2, 5),
}


@pytest.mark.once
@pytest.mark.parametrize("ratio", [0.15, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_i7_odd_shapes(shape, ratio):
    prompt = random_prompt(8, *SHAPES[shape])
    engine = fresh_engine("llama3", ratio)
    full = engine.prefill(prompt, "full")
    for _ in range(2):  # without, then with stored KV
        for mode in ("prefix", "blend", "reuse"):
            out = engine.prefill(prompt, mode)
            assert np.isfinite(out.logits).all()
            assert out.recomputed[:, -1].all()
            if mode == "prefix" or (mode == "blend" and ratio == 1.0) or out.stats.candidates == 0:
                assert_full(out, full)
        engine.flush()


@pytest.mark.once
def test_i7_order_and_repeats():
    engine, prompt = fresh_engine("qwen2", 1.0, "query"), random_prompt(9, (12, 15, 1, 10))  # I1 has the programs
    engine.precompute(prompt)
    chunks = [prompt.chunks[i] for i in (3, 0, 0, 2, 1, 0)]
    shuffled = cb.Prompt(prompt.prefix, chunks, prompt.suffix)
    out = engine.prefill(shuffled)
    assert out.stats.hits == 6
    assert_full(out, engine.prefill(shuffled, "full"))


@pytest.mark.once
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    stored=st.sets(st.integers(0, 5)),
    prefix=st.integers(0, 12),
    suffix=st.integers(1, 20),
    blend=st.sampled_from([(0.0, "hkvd"), (0.15, "hkvd"), (0.15, "query"), (0.4, "epic"), (1.0, "cross")]),
    seed=st.integers(0, 3),
)
def test_any_mix_of_hits_and_misses_is_budgeted_and_right(lengths, stored, prefix, suffix, blend, seed):
    ratio, selector = blend  # each pair has programs of its own
    engine = fresh_engine("llama3", ratio, selector)
    prompt = random_prompt(seed, lengths, prefix, suffix)
    hits = [chunk for i, chunk in enumerate(prompt.chunks) if i in stored]
    engine.precompute(hits, prefix=prompt.prefix)
    out, full = engine.prefill(prompt), engine.prefill(prompt, "full")
    stats = out.stats
    assert stats.exact + stats.candidates + stats.forced == out.token_ids.size
    assert out.recomputed[:, -suffix:].all()
    if stats.candidates and ratio > 0:
        assert abs(stats.recompute_ratio - ratio) <= 1 / stats.candidates + 1e-9
    if ratio == 1.0 or not stats.candidates:
        assert_full(out, full)
    # no later layer computes what an earlier layer dropped
    assert (out.recomputed[1:] <= out.recomputed[:-1]).all()
    engine.flush()


@pytest.mark.once
def test_stored_kv_does_not_depend_on_where_it_was_first_used():
    prompt = random_prompt(10)
    engine = fresh_engine("qwen3")
    keys = engine.precompute(prompt)
    computed = {key: engine.store.get(key) for key in keys}
    engine.store.clear()
    engine.prefill(prompt)  # all missing: stored after the first token
    engine.flush()
    for key in keys:
        np.testing.assert_array_equal(engine.store.get(key).k, computed[key].k)
        np.testing.assert_array_equal(engine.store.get(key).v, computed[key].v)


def test_a_stage_more_takes_no_memory_for_layers_that_are_not_running():
    config = dataclasses.replace(
        FAMILIES["llama2"], hidden_size=128, intermediate_size=1024, num_layers=12, windows=(), check_layer=1
    )
    model, prompt, peak = cb.model.random_model(config), random_prompt(5), {}
    layer_bytes = sum(leaf[0].nbytes for leaf in jax.tree.leaves(model.params.layers))
    for stages in (1, 3):
        engine = cb.Engine(model, blend=cb.BlendConfig(num_stages=stages))
        engine.precompute(prompt)
        peak[stages] = engine.prefill(prompt).stats.peak_memory_bytes
    assert peak[3] - peak[1] < layer_bytes / 2


def test_no_array_is_tokens_by_tokens():
    tokens = 2048
    engine = cb.Engine(family_model("llama3"), blend=TWO_STAGES)
    prompt = random_prompt(12, (900, 1000), 48, 100)
    engine.precompute(prompt)
    for mode in ("full", "blend"):
        assert engine.prefill(prompt, mode).token_ids.size == tokens
    shapes = [
        [int(size) for size in shape.split(",") if size]
        for program in engine.model.runner.texts()
        for shape in re.findall(r"\w\[([\d,]*)\]", program)
    ]
    assert max(sum(size >= tokens // 2 for size in shape) for shape in shapes) == 1


@pytest.mark.once
def test_another_model_finds_nothing():
    store, prompt = cb.ChunkStore(), random_prompt(11)
    cb.Engine(family_model("llama3"), store).precompute(prompt)
    other = cb.model.random_model(FAMILIES["llama3"], seed=8)
    assert cb.Engine(other, store, TWO_STAGES).prefill(prompt).stats.hits == 0
    assert cb.Engine(family_model("llama3"), store, TWO_STAGES).prefill(prompt).stats.hits == 4


@pytest.mark.once
def test_no_compile_for_another_prompt_of_the_same_bucket():
    # A model of its own, whose runner has no other test's programs.
    engine = cb.Engine(cb.model.random_model(FAMILIES["llama3"], seed=7), blend=TWO_STAGES)
    assert engine.warmup(128, modes=("blend", "full"), prefix_tokens=9, suffix_tokens=32) > 0
    prompts = [random_prompt(seed, lengths, 9, 20) for seed, lengths in ((1, (30, 60)), (2, (45, 33)), (3, (20, 10)))]
    for prompt in prompts:
        engine.precompute(prompt)
    count = engine.model.runner.count
    for prompt in prompts:
        for mode in ("blend", "full"):
            assert engine.prefill(prompt, mode).stats.compile_s == 0
    assert engine.model.runner.count == count
