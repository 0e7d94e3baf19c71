"""Timing: the report of `bench` as a call, and the random prompts that are timed."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import family_model

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation import bench as bench_module
from cacheblend_jax.evaluation.bench import bench
from cacheblend_jax.evaluation.prompts import random_prompt
from cacheblend_jax.evaluation.tables import bench_table


def test_a_bench_is_a_call_that_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "PAUSE_S", 0.0)
    steps = []
    report = bench(family_model("llama3"), tokens=(64,), chunks=2, question_tokens=8, repeats=2, announce=steps.append)
    assert capsys.readouterr() == ("", "")
    assert steps == [
        "64 tokens: precomputing and compiling",
        "64 tokens: round 1 of 2",
        "64 tokens: round 2 of 2",
    ]
    assert [row["mode"] for row in report.rows] == ["full", "prefix", "reuse", "blend 0.15"]
    assert all(row["compiles_after_warmup"] == 0 for row in report.rows)
    assert bench_table(report).splitlines()[-1].startswith("64 tokens: ")


def test_a_random_prompt_has_the_parts_asked_for_and_follows_from_its_arguments():
    prompt = random_prompt(97, 21, chunks=4, prefix_tokens=3, question_tokens=5)
    assert [len(chunk) for chunk in prompt.chunks] == [6, 5, 5, 5]
    assert (len(prompt.prefix), len(prompt.suffix)) == (3, 5)
    again, other = (random_prompt(97, 21, chunks=4, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.chunks[0], prompt.chunks[0])
    assert not np.array_equal(other.chunks[0], prompt.chunks[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 9}, "tokens must be at least chunks, and chunks at least 1; got 8 and 9"),
        ({"chunks": 0}, "got 8 and 0"),
        ({"prefix_tokens": -1}, "prefix_tokens and question_tokens must be at least 0, got -1 and 32"),
    ],
)
def test_a_random_prompt_that_makes_no_sense_is_named(options, message):
    with pytest.raises(CacheBlendError, match=message):
        random_prompt(97, 8, **options)


def test_a_bench_without_a_ratio_is_named():
    with pytest.raises(CacheBlendError, match="at least one recompute ratio"):
        bench(family_model("llama3"), ratios=())
