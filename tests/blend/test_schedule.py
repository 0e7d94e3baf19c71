"""Plans: padding, stages, and the budget shared among them."""

from __future__ import annotations

import math

import pytest
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to, small_bucket
from cacheblend_jax.blend.schedule import (
    BlendConfig,
    full_plan,
    layer_groups,
    make_plan,
    stage_ratios,
    survivor_counts,
)
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.config import ModelConfig

ratios = st.one_of(st.sampled_from([0.0, 0.15, 1.0]), st.floats(0, 1))


@given(st.integers(1, 300_000))
def test_length_buckets_hold_their_lengths_and_waste_little(length):
    bucket = Buckets().length(length)
    assert bucket >= length
    assert Buckets().length(bucket) == bucket
    assert bucket % 8 == 0
    if length > 1024:
        assert bucket <= length * 33 / 32 + 1


@given(st.integers(1, 100_000))
def test_forced_buckets_hold_their_counts(count):
    assert count <= small_bucket(count) <= max(2 * count, 32)
    assert small_bucket(small_bucket(count)) == small_bucket(count)


def test_buckets_up_to_lists_every_bucket_once():
    assert buckets_up_to(Buckets().length, 3000) == sorted({Buckets().length(n) for n in range(1, 3001)})
    assert buckets_up_to(small_bucket, 3000) == sorted({small_bucket(n) for n in range(1, 3001)})


def test_chosen_buckets_are_few():
    buckets = Buckets((300, 1000))
    assert {buckets.length(n) for n in range(1, 1001)} == {300, 1000}
    assert buckets.length(1001) == Buckets().length(1001)
    assert {buckets.active(n) for n in range(257, 1001)} == {300, 1000}
    assert buckets.active(20) == 32


@pytest.mark.parametrize("sizes", [(), (0, 8), (8, 8), (16, 8), (8.5,), (True,)])
def test_buckets_that_make_no_sense_are_named(sizes):
    with pytest.raises(CacheBlendError, match="length_buckets must be None or whole numbers"):
        Buckets(sizes)


@given(ratios, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_stage_ratios_fall_and_average_to_the_ratio(ratio, sizes):
    stages = stage_ratios(ratio, sizes)
    mean = sum(r * size for r, size in zip(stages, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(ratio, abs=1e-9)
    assert stages == sorted(stages, reverse=True)
    assert 0 <= stages[-1] <= stages[0] <= 1


def test_the_taper_says_how_far_stage_ratios_fall():
    assert stage_ratios(0.2, [2, 2, 2], 0.0) == pytest.approx([0.2, 0.2, 0.2])
    assert stage_ratios(0.2, [2, 2, 2], 0.5) == pytest.approx([0.3, 0.2, 0.1])


@given(st.integers(2, 80), st.integers(1, 79), st.integers(1, 8))
def test_layer_groups_cover_the_layers_after_the_check_layer(num_layers, check_layer, num_stages):
    if check_layer >= num_layers - 1:
        return
    groups = layer_groups(num_layers, check_layer, num_stages)
    layers = [layer for first, last in groups for layer in range(first, last + 1)]
    assert layers == list(range(check_layer + 1, num_layers))
    assert len(groups) <= num_stages


@settings(max_examples=300)
@given(
    ratio=ratios,
    candidates=st.integers(1, 5000),
    forced=st.integers(1, 500),
    exact=st.integers(0, 500),
    num_layers=st.integers(1, 20),
    check_layer=st.integers(1, 5),
    num_stages=st.integers(1, 5),
)
def test_every_stage_has_room_for_its_survivors(ratio, candidates, forced, exact, num_layers, check_layer, num_stages):
    plan = make_plan(
        num_layers=num_layers,
        length=exact + candidates + forced,
        active=candidates + forced,
        forced=forced,
        blend=BlendConfig(ratio, num_stages=num_stages),
        check_layer=check_layer,
    )
    layers = [layer for stage in plan.stages for layer in range(stage.first, stage.border + 1)]
    assert layers == list(range(num_layers))
    rows = [stage.rows for stage in plan.stages]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == plan.active >= candidates + forced
    sizes = [stage.border - stage.first + 1 for stage in plan.stages[1:]]
    wanted = [math.ceil(r * candidates - 1e-9) + forced for r in stage_ratios(ratio, sizes)] if sizes else []
    assert survivor_counts(plan, ratio, candidates, forced) == wanted


def test_full_prefill_is_one_stage():
    plan = full_plan(12, 100)
    assert plan.nothing_cached
    assert [(stage.first, stage.border) for stage in plan.stages] == [(0, 11)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("mode", "most", "prefix", "chunk", "lengths"),
    [
        *((mode, 300, 9, 0, None) for mode in ("full", "prefix", "reuse")),
        *(("blend", most, 9, chunk, None) for most, chunk in ((1, 0), (130, 0), (300, 0), (300, 5))),
        *((mode, 150, 0, 5, None) for mode in ("prefix", "reuse", "blend")),
        ("blend", 300, 9, 5, (100, 290)),
    ],
)
def test_warmup_plans_are_all_there_are(mode, most, prefix, chunk, lengths):
    config = ModelConfig("LlamaForCausalLM", 97, 32, 48, 6, 4, 2, 8, 4096)
    planner = Planner(config, BlendConfig(), Buckets(lengths))
    with unchecked():
        every = {
            planner.plan(mode, length, exact, 0 if mode in ("full", "prefix") else length - exact - suffix)
            for exact in {0, *range(prefix, prefix + chunk + 1)}
            for length in range(exact + 1, most + 1)
            for suffix in {1, 2, 31, 32, 33, 34, 35, length - exact - 1, length - exact}  # around a bucket's border
            if 1 <= suffix <= min(35, length - exact)
        }
    assert set(planner.plans_up_to(most, (mode,), prefix, 35, chunk)) == every


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_ratio": 1.5}, r"recompute_ratio must be in \[0, 1\], got 1.5"),
        ({"recompute_ratio": -0.1}, "got -0.1"),
        ({"recompute_ratio": float("nan")}, "got nan"),
        ({"recompute_ratio": "0.15"}, "got '0.15'"),
        ({"recompute_ratio": True}, "got True"),
        ({"selector": "hkdv"}, "unknown selector 'hkdv'; known: cross, epic, hkvd, oracle, query, random"),
        ({"deviation": "q"}, "deviation must be"),
        ({"num_stages": 0}, "num_stages must be"),
        ({"check_layer": 0}, "check_layer must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**31}, "seed must be"),
    ],
)
def test_a_blend_that_makes_no_sense_is_named(options, message):
    with pytest.raises(CacheBlendError, match=message):
        BlendConfig(**options)
