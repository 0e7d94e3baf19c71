"""One prompt looked at closely: what an inspection measures is what prefills return."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TWO_STAGES, family_model, fresh_engine, random_prompt
from inspections import made_inspection

import cacheblend_jax as cb
from cacheblend_jax.evaluation.insights import standalone_deviation
from cacheblend_jax.evaluation.inspection import inspect, measure_ratios

FAMILY = "qwen3"


@pytest.fixture(scope="module")
def engine() -> cb.Engine:
    return fresh_engine(FAMILY)


@pytest.fixture(scope="module")
def found(engine):
    return inspect(engine, random_prompt(3), max_new_tokens=2)


def test_an_inspection_has_what_prefills_return(engine, found):
    prompt = random_prompt(3)
    out = engine.prefill(prompt)
    np.testing.assert_array_equal(found.recomputed, out.recomputed)
    np.testing.assert_allclose(found.deviation[:, found.candidate], standalone_deviation(engine, prompt), rtol=1e-5)
    assert [part.num_tokens for part in found.parts] == [9, 30, 40, 1, 25, 7]
    assert found.candidate.nonzero()[0].tolist() == list(range(9, 105))
    assert not found.deviation[:, ~found.candidate].any()
    assert found.texts == tuple(f"{token} " for token in out.token_ids)  # the model has no tokenizer
    assert {mode: len(answer.token_ids) for mode, answer in found.answers.items()} == dict.fromkeys(
        ("full", "prefix", "reuse", "blend"), 2
    )
    assert found.answers["full"].token_ids == found.answers["prefix"].token_ids


def test_tokens_once_dropped_are_recomputed_no_more(found):
    """Reports give a token's last layer alone."""
    assert (np.diff(found.recomputed.astype(int), axis=0) <= 0).all()


def test_a_blend_lies_between_reuse_and_full_recompute(found):
    deviation = found.mean_deviation()
    assert 0 < deviation["blend"] < deviation["reuse"]
    assert found.cross_attention_share("full") == 1
    assert found.cross_attention_share("reuse") == 0
    assert 0.15 < found.cross_attention_share("blend") < 1
    assert found.attention_deviation["blend"].mean() < found.attention_deviation["reuse"].mean()
    assert -1 <= found.mean_neighbour_correlation() <= 1


def test_attention_to_other_chunks_is_a_mean_over_the_chunks_tokens():
    found = made_inspection((4, 6))
    wanted = found.attention["full"][:, 2, 1] * 0.6  # of ten tokens, six have another chunk before them
    np.testing.assert_allclose(found.cross_attention["full"], wanted)


def test_a_single_chunk_pays_no_other():
    found = made_inspection((4,))
    assert np.isnan(found.cross_attention_share("blend"))


def test_ratios_are_measured_against_full_recompute(engine):
    settings, lines = measure_ratios(engine, random_prompt(3), ["hkvd"], [0.15, 1.0], continuation_tokens=3)
    assert [setting.label for setting in settings] == ["reuse", "hkvd 0.15", "hkvd 1"]
    assert [line["setting"] for line in lines] == ["reuse", "hkvd 0.15", "hkvd 1"]
    reuse, some, whole = lines
    assert whole["kl"] == pytest.approx(0, abs=1e-6)
    assert whole["attention_deviation"] == pytest.approx(0, abs=1e-4)
    assert some["attention_deviation"] < reuse["attention_deviation"]
    assert measure_ratios(engine, random_prompt(3), ["hkvd"], []) == ([], [])
    with pytest.raises(cb.CacheBlendError, match="unknown selector 'best'"):
        measure_ratios(engine, random_prompt(3), ["best"], [0.15])


def test_what_cannot_be_inspected_is_refused(engine):
    with pytest.raises(cb.CacheBlendError, match="the prompt has no chunks"):
        inspect(engine, cb.Prompt([1, 2], [], [3]))
    with pytest.raises(cb.CacheBlendError, match="each of the prompt's 4 chunks, got 1"):
        inspect(engine, random_prompt(3), chunk_names=["one"])
    automatic = cb.Engine(family_model(FAMILY), blend="auto")
    with pytest.raises(cb.CacheBlendError, match="'auto' is none"):
        inspect(automatic, random_prompt(3))


def test_a_chunk_that_does_not_fit_into_the_store_is_computed(found):
    """It is forced in the blend: nothing of it is stored, so that nothing deviates."""
    model, prompt = family_model(FAMILY), random_prompt(3)
    with cb.Engine(model, cb.ChunkStore(host_bytes=1), TWO_STAGES) as engine:
        without = inspect(engine, prompt, max_new_tokens=1)
    assert not without.candidate.any()
    assert not without.deviation.any()
    assert np.isnan(without.mean_deviation()["reuse"])
    assert np.isnan(without.mean_neighbour_correlation())
    assert without.cross_attention_share("reuse") == pytest.approx(1)
