"""A conversation goes on over its own KV: what is prefilled later equals one full prefill of everything."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import fresh_engine, random_prompt, relative_error

import cacheblend_jax as cb

# 103 tokens of prompt: the cache has 128 keys, and the rows of what follows reach beyond them, or don't.
LATER = [list(range(20, 27)), list(range(30, 75))]


def in_full(engine, token_ids) -> cb.PrefillResult:
    return engine.prefill(cb.Prompt([], [], np.asarray(token_ids, np.int32)), "full")


def assert_equal(out: cb.PrefillResult, wanted: cb.PrefillResult) -> None:
    np.testing.assert_array_equal(out.token_ids, wanted.token_ids)
    assert relative_error(out.logits, wanted.logits) < 1e-5
    assert out.next_token == wanted.next_token
    for ours, full in ((out.cache.k, wanted.cache.k), (out.cache.v, wanted.cache.v)):
        assert relative_error(ours, full) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])  # the latter two have windows
def test_what_follows_a_full_prefill_equals_another(family):
    engine = fresh_engine(family)
    out = engine.prefill(random_prompt(31, (30, 40, 1, 16)), "full")
    length = out.token_ids.size
    for later in LATER:
        before = out.token_ids
        out = engine.extend(out, later)
        assert_equal(out, in_full(engine, [*before.tolist(), *later]))
        stats = out.stats
        assert (stats.mode, stats.exact, stats.forced, stats.tokens) == (
            "extend",
            length,
            len(later),
            length + len(later),
        )
        assert out.recomputed.sum(axis=1).tolist() == [len(later)] * engine.model.config.num_layers
        assert 0 < stats.flops < in_full(engine, out.token_ids).stats.flops
        length += len(later)


@pytest.fixture(scope="module")
def prefilled():
    engine = fresh_engine("qwen3")
    return engine, engine.prefill(random_prompt(31, (30, 40, 1, 16)), "full")


def streamed(engine, out, **options):
    """An answer's stream; `Engine.stream` prefills, too."""
    return engine.stream(cb.Prompt([], [], out.token_ids), "full", max_new_tokens=9, tokens_at_once=4, **options)


@pytest.mark.parametrize("read", [0, 1, 3, 9])
def test_it_goes_on_after_as_much_of_an_answer_as_was_read(prefilled, read):
    engine, out = prefilled
    stream = streamed(engine, out, stop_token_ids=())
    tokens = [token for token, _ in (next(stream) for _ in range(read))]
    said = [*out.token_ids.tolist(), *tokens]
    extended = engine.extend(stream, LATER[0])
    assert_equal(extended, in_full(engine, said + LATER[0]))
    assert extended.stats.forced - len(LATER[0]) <= 1  # the last token's KV was not there yet
    assert [token for token, _ in stream] == engine.complete(out, max_new_tokens=9, stop_token_ids=()).token_ids[read:]


def test_it_goes_on_after_an_answer_that_stopped(prefilled):
    engine, out = prefilled
    free = engine.complete(out, max_new_tokens=9, stop_token_ids=()).token_ids
    stream = streamed(engine, out, stop_token_ids=[free[6]])
    answer = [token for token, _ in stream]
    assert answer == free[: free.index(free[6])]
    assert_equal(engine.extend(stream, LATER[1]), in_full(engine, [*out.token_ids.tolist(), *answer, *LATER[1]]))


def test_a_cache_lost_to_an_interrupt_costs_the_answer_a_second_prefill(prefilled):
    engine, out = prefilled
    stream = streamed(engine, out, stop_token_ids=())
    answer = [token for token, _ in stream]
    stream._cache.k.delete()
    extended = engine.extend(stream, LATER[0])
    assert_equal(extended, in_full(engine, [*out.token_ids.tolist(), *answer, *LATER[0]]))
    assert extended.stats.forced == len(answer) + len(LATER[0])


def test_a_context_may_be_continued_in_several_ways(prefilled):
    engine, out = prefilled
    first, other = engine.extend(out, LATER[0]), engine.extend(out, LATER[1])
    assert_equal(engine.extend(out, LATER[0]), first)
    assert other.token_ids.size == out.token_ids.size + len(LATER[1])


def test_an_answer_after_it_is_that_of_the_whole_prompt(prefilled):
    engine, out = prefilled
    extended, options = engine.extend(out, LATER[0]), {"max_new_tokens": 9, "stop_token_ids": ()}
    wanted = engine.complete(in_full(engine, extended.token_ids), **options)
    assert engine.complete(extended, **options).token_ids == wanted.token_ids


def test_what_makes_no_sense_is_named(prefilled):
    engine, out = prefilled
    with pytest.raises(cb.PromptError, match="what follows has no tokens"):
        engine.extend(out, [])
    with pytest.raises(cb.PromptError, match="what follows has token id 97"):
        engine.extend(out, [97])
    with pytest.raises(cb.PromptError, match="the conversation has 2103 tokens, but the model takes at most 2048"):
        engine.extend(out, [1] * 2000)
