"""Decoding in blocks on the device: the tokens of one step after another, wherever an answer ends."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_programs
from conftest import FAMILIES, TWO_STAGES, family_model, fresh_engine, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.engine import generation
from cacheblend_jax.model.decode import MOST_AT_ONCE, decode_tokens
from cacheblend_jax.model.kv_cache import GrowingCache, abstract_cache
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.sampling import Draw, sample
from cacheblend_jax.model.transformer import abstract_params

SAMPLINGS = [
    None,
    cb.Sampling(temperature=1.5, seed=3),
    cb.Sampling(temperature=0.7, top_k=9, top_p=0.8, seed=2**32 - 1),
]


@pytest.fixture(scope="module")
def prefilled():
    engine = fresh_engine("llama3")
    return engine, engine.prefill(random_prompt(5), "full")


def one_by_one(engine, out, count: int, sampling: cb.Sampling | None) -> list[int]:
    """The answer's tokens, each drawn on the host from the logits after those before it."""
    ids: list[int] = []
    for number in range(count):
        logits = engine.continuation_logits(out, [*ids, *[0] * (count - number)])[number]  # one program for all
        if sampling is None:
            ids.append(int(np.argmax(logits)))
        else:
            key = jax.random.fold_in(jax.random.key(sampling.seed), number)
            cuts = sampling.temperature, sampling.top_k, sampling.top_p
            ids.append(int(jax.jit(sample)(jnp.asarray(logits), key, *cuts)))
    return ids


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1.0, 4096), (9, 1.0, 9), (0, 1e-9, 1)])
def test_a_top_p_of_1_keeps_all_tokens_also_where_the_sum_of_the_likelier_ones_is_rounded_to_1(
    monkeypatch, top_k, top_p, kept
):
    drawn_from = []
    monkeypatch.setattr(jax.random, "categorical", lambda _, ranked: (drawn_from.append(ranked), jnp.int32(0))[1])
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, 4096), jnp.float32)
    sample(logits, jax.random.key(0), 1.0, top_k, top_p)
    assert np.isfinite(drawn_from[0]).sum() == kept


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_blocks_of_any_size_have_the_tokens_of_one_step_after_another(prefilled, sampling):
    engine, out = prefilled
    wanted = one_by_one(engine, out, 12, sampling)
    for at_once in (1, 5, MOST_AT_ONCE, None):
        answer = engine.complete(out, max_new_tokens=12, sampling=sampling, stop_token_ids=(), tokens_at_once=at_once)
        assert answer.token_ids == wanted
        assert (answer.stats.decoded, answer.stats.finish_reason) == (11, "length")
        assert answer.stats.seconds_per_token > 0


@pytest.mark.parametrize("index", [0, 1, 4, 5, 6])  # the prefill's own, and the first, middle and last of blocks of 5
def test_an_answer_ends_before_a_stop_token_wherever_it_stands_in_a_block(prefilled, index, monkeypatch):
    engine, out = prefilled
    sampling = cb.Sampling(temperature=3.0, seed=1)
    free = engine.complete(out, max_new_tokens=12, sampling=sampling, stop_token_ids=(), tokens_at_once=5).token_ids
    counts, run = [], generation._decode_block

    def counted(*arguments):
        block = run(*arguments)
        counts.append(int(block.num_tokens))
        return block

    monkeypatch.setattr(generation, "_decode_block", counted)
    at = free.index(free[index])
    stops = [free[index], 10**9, -1]  # no token of the model's: never met
    tokens = []
    answer = engine.complete(
        out,
        max_new_tokens=12,
        sampling=sampling,
        stop_token_ids=stops,
        tokens_at_once=5,
        on_token=lambda token, _: tokens.append(token),
    )
    assert answer.token_ids == tokens == free[:at]
    assert answer.stats.finish_reason == "stop"
    assert sum(counts) == at  # nothing is decoded after it


def test_a_callback_that_raises_ends_its_own_answer_alone(prefilled):
    engine, out = prefilled
    options = {"max_new_tokens": 8, "stop_token_ids": (), "tokens_at_once": 4}
    wanted, seen = engine.complete(out, **options).token_ids, []

    def interrupt(token: int, _: str) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.complete(out, **options, on_token=interrupt)
    assert seen == wanted[:3]
    assert engine.complete(out, **options).token_ids == wanted


def test_a_budget_of_one_token_decodes_nothing(prefilled, monkeypatch):
    engine, out = prefilled
    monkeypatch.setattr(generation, "_decode_block", None)
    answer = engine.complete(out, max_new_tokens=1, stop_token_ids=())
    assert answer.token_ids == [out.next_token]
    assert (answer.stats.decoded, answer.stats.seconds_per_token) == (0, 0.0)


def test_callbacks_come_block_by_block(prefilled, monkeypatch):
    engine, out = prefilled
    limits, run = [], generation._decode_block
    monkeypatch.setattr(generation, "_decode_block", lambda *of: limits.append(of[5]) or run(*of))
    engine.complete(out, max_new_tokens=12, stop_token_ids=(), tokens_at_once=5)
    assert limits == [5, 5, 1]
    limits.clear()
    monkeypatch.setattr(generation, "BLOCK_SECONDS", 10**6)
    engine.complete(out, max_new_tokens=90, stop_token_ids=())
    assert limits == [1, 88, 24]  # what one token takes is known after it; the program itself ends at 64
    with pytest.raises(cb.PromptError, match=r"tokens_at_once must be None or a whole number in \[1, 64\], got 65"):
        engine.complete(out, tokens_at_once=65)


def test_the_cache_holds_the_last_token_that_the_model_has_room_for():
    engine = fresh_engine("llama3")
    most = engine.model.config.max_positions
    prompt = random_prompt(1, (2000,), 20, 20)
    out = engine.prefill(prompt, "full")
    answer = engine.complete(out, max_new_tokens=50, stop_token_ids=(), tokens_at_once=MOST_AT_ONCE)
    assert out.token_ids.size + len(answer.token_ids) == most + 1
    longest = cb.Prompt([], [], [*out.token_ids.tolist(), *answer.token_ids[:-1]])
    assert engine.prefill(longest, "full").next_token == answer.token_ids[-1]


@contextmanager
def compilations():
    """Collects the names of all programs that XLA compiles, or reads from its cache, whoever asks for them."""
    shared_programs.forget()  # what other tests have compiled
    names: list[str] = []

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            names.extend(re.findall(r"Finished XLA compilation of (\S+)", record.getMessage()))

    logger, handler = logging.getLogger("jax._src.dispatch"), Names()
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def test_after_warm_up_nothing_compiles_for_an_answer_or_its_cache():
    engine = cb.Engine(cb.model.random_model(FAMILIES["llama3"], seed=9), blend=TWO_STAGES, length_buckets=(64, 96))
    with compilations() as names:
        engine.warmup(64, modes=(), max_new_tokens=9)
    assert {"jit(decode_tokens)", "jit(with_room)", "jit(next_token)"} <= set(names)
    with compilations() as names:
        for length in (57, 60, 64):  # the cache stays, and grows
            prompt = cb.Prompt([], [], np.arange(length, dtype=np.int32))
            for sampling in SAMPLINGS:
                engine.generate(prompt, "full", max_new_tokens=9, sampling=sampling, stop_token_ids=[5])
            out = engine.prefill(prompt, "full")
            assert out.cache.k.shape[1] == length
    assert names == []


def test_the_cache_of_a_result_is_made_once(prefilled):
    _, out = prefilled
    assert out.cache is out.cache
    length = out.token_ids.size
    assert out.padded_cache.k.shape[1] > length
    np.testing.assert_array_equal(np.asarray(out.cache.k), np.asarray(out.padded_cache.k)[:, :length])
    np.testing.assert_array_equal(np.asarray(out.cache.v), np.asarray(out.padded_cache.v)[:, :length])
    assert out.cache.k.sharding == out.padded_cache.k.sharding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cache_that_grows_is_written_in_place(dtype):
    """On a CPU XLA would convert all layers of 16-bit floats, both ways, for every row of every layer."""
    import dataclasses

    config, keys = dataclasses.replace(FAMILIES["llama3"], dtype=dtype), 160
    placement = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    cache = jax.eval_shape(GrowingCache.from_cache, abstract_cache(config, keys, placement))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    is_stop = jax.ShapeDtypeStruct((config.vocab_size,), bool)
    arguments = (*[scalar] * 4, is_stop, Draw.by(cb.Sampling()), rope_tables(config, keys))
    decode = jax.jit(lambda *of: decode_tokens(*of, config=config), donate_argnums=1)
    compiled = decode.lower(abstract_params(config), cache, *arguments).compile()
    stack = f"[{config.num_layers},{keys},{config.num_kv_heads},{config.head_dim}]"
    made = re.findall(rf"= (\w+){re.escape(stack)}\S* (\w[\w-]*)\(", compiled.as_text())
    assert made
    assert not [op for _, op in made if op in ("convert", "copy", "bitcast-convert", "select")]


def test_bits_keep_every_float():
    config = family_model("llama3").config
    values = jnp.asarray([[[[0.0, -0.0, jnp.inf, jnp.nan, 1e-40, -1.5, 3e38, 1.0]]]], jnp.bfloat16)
    assert config.head_dim == values.shape[-1]
    cache = cb.KVCache(values, -values)
    again = jax.jit(lambda cache: GrowingCache.from_cache(cache).cache())(cache)
    for one, other in zip((again.k, again.v), (cache.k, cache.v), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(one).view(np.uint16), np.asarray(other).view(np.uint16))
