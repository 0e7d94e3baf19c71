"""Metrics, what the paper observes of deviation, and the check layer found by it."""

from __future__ import annotations

import numpy as np
import pytest

from cacheblend_jax.evaluation import check_layer, insights, metrics
from cacheblend_jax.model import KVCache


def test_answers_are_normalised_as_squad_does():
    assert metrics.normalize_answer("The  Exeter, College!") == "exeter college"
    assert metrics.exact_match("the Oslo.", ["Lima", "oslo"]) == 1.0
    assert metrics.exact_match("Oslo Lima", ["Oslo"]) == 0.0
    assert metrics.token_f1("Exeter College, Oxford", ["Exeter College"]) == pytest.approx(0.8)
    assert metrics.token_f1("", ["a"]) == 1.0
    assert metrics.token_f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert metrics.rouge_l("the cat sat", ["the dog sat"]) == pytest.approx(2 / 3)


def test_the_distance_over_a_continuation_is_that_of_the_distributions():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.6, 0.3])
    full, other = np.log([p, p, q]) - 3, np.log([q, p, q]) + 5
    distance = metrics.continuation_distance(other, full, np.array([1, 0, 2]))
    np.testing.assert_allclose(distance.kl, [np.sum(p * np.log(p / q)), 0, 0], atol=1e-12)
    assert distance.nll_difference == pytest.approx((np.log(0.2) - np.log(0.6)) / 3)
    assert distance.agreement == pytest.approx(2 / 3)


def test_the_interval_holds_the_mean_and_narrows_with_more_values():
    values = np.random.default_rng(0).random(400)
    wide, narrow = metrics.bootstrap_interval(values[:20]), metrics.bootstrap_interval(values)
    assert narrow[0] < values.mean() < narrow[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert metrics.bootstrap_interval([1.0]) == (1.0, 1.0)


def test_paired_values_are_drawn_together():
    first = np.random.default_rng(1).random(30)

    def difference(one, other, axis):
        return one.mean(axis) - other.mean(axis)

    low, high = metrics.bootstrap_interval(first, first - 0.25, statistic=difference)
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_kv_deviation_counts_only_the_prompts_tokens():
    rng = np.random.default_rng(0)
    k, v, other = (rng.standard_normal((2, 6, 1, 4)).astype(np.float32) for _ in range(3))
    deviation = np.asarray(metrics.kv_deviation_by_layer(KVCache(other, v), KVCache(k, v), 4))
    expected = np.square(other - k)[:, :4].sum((2, 3)) / np.square(k)[:, :4].sum((2, 3)).mean(1, keepdims=True)
    np.testing.assert_allclose(deviation[:, :4], expected, rtol=1e-5)
    assert not deviation[:, 4:].any()


def test_insights_on_deviations_made_by_hand():
    deviation = np.zeros((5, 20), np.float32)
    deviation[1] = np.arange(20)[::-1]  # ranks the other way round than the layers above
    deviation[2:] = np.arange(20) ** 3.0
    assert insights.concentration(deviation, 0.15)[2] == pytest.approx(
        (17**3 + 18**3 + 19**3) / (np.arange(20) ** 3).sum()
    )
    assert np.isnan(insights.concentration(deviation)[0])
    np.testing.assert_allclose(insights.neighbour_correlation(deviation)[1:], [-1, 1, 1])
    scores = check_layer.check_layer_scores([deviation, deviation])
    assert scores[1] < 0.01
    assert scores[2] == pytest.approx(1)
    assert check_layer.find_check_layer(scores) == 2
