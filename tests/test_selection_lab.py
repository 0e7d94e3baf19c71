"""The selection lab: what it simulates is what an engine does, and its results say how far that is from full."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import HF, TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine.layout import ChunkContext
from cacheblend_jax.engine.prompt import tokenize_prompt
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.params import Params, stacked
from cacheblend_jax.model.transformer import joined_by_layer
from scripts.selection_lab import REUSE, Lab, Setting, compare, first_words, main, parse, settings_of

pytestmark = pytest.mark.once

TEXT = np.random.default_rng(60).integers(0, 97, 11).astype(np.int32)
AFTER_TEXT = ChunkContext(text_ids=TEXT)
LENGTHS = ((30, 40, 1, 25), (12, 33))  # chunks of the prompts: padding differs


@pytest.fixture(scope="module")
def lab():
    model = family_model("gemma3_capped")
    prompts = [random_prompt(61 + i, lengths) for i, lengths in enumerate(LENGTHS)]
    return Lab.of(model, [tokenize_prompt(prompt, None, vocab_size=97, max_tokens=500) for prompt in prompts])


def test_a_simulated_blend_computes_what_an_engine_does(lab):
    """Windows, norms, and fewer tokens from stage to stage; the text before the chunks stands in no prompt."""
    parts, cached, in_chunks = (
        lab.tokenized[1],
        lab.chunk_kv(AFTER_TEXT)[1],
        np.flatnonzero(lab.prompts[1].candidate),
    )
    reused = lab.blend(1, cached, REUSE, with_mass=True)
    with cb.Engine(lab.model, context=TEXT) as engine:
        prompt = cb.Prompt(parts.prefix, parts.chunks, parts.suffix)
        engine.precompute(prompt)
        out = engine.prefill(prompt, "reuse")
        assert relative_error(reused.logits[0], out.logits) < 1e-5
        assert not np.asarray(reused.computed)[1:, in_chunks].any()  # K, V of the first layer depend on nothing
        for selector, first in (("hkvd", 0), ("query", 1)):
            blend = replace(TWO_STAGES, recompute_ratio=0.3, selector=selector, check_layer=2)
            out = engine.prefill(prompt, "blend", blend=blend)
            setting = Setting(selector, 0.3, first, check_layer=2, stages=2)
            simulated = lab.blend(1, cached, setting, reused.mass)
            assert relative_error(simulated.logits[0], out.logits) < 1e-5
            np.testing.assert_array_equal(np.asarray(simulated.computed)[:, in_chunks], out.recomputed[:, in_chunks])
            assert 0 < out.recomputed[5, in_chunks].sum() < out.recomputed[3, in_chunks].sum() < in_chunks.size


def test_a_simulated_blend_that_recomputes_all_is_full_recompute(lab):
    cached = lab.chunk_kv(AFTER_TEXT)
    blends = [lab.blend(number, kv, Setting(ratio=1.0, check_layer=2)) for number, kv in enumerate(cached)]
    distances = lab.distances(blends)
    assert np.abs(distances.kl).max() < 1e-6
    np.testing.assert_array_equal(distances.agreement, 1.0)
    for blend, prompt in zip(blends, lab.prompts, strict=True):
        assert np.asarray(blend.computed)[:, prompt.candidate].all()


def test_the_first_tokens_of_each_chunk_come_before_all_others(lab):
    cached, prompt = lab.chunk_kv(AFTER_TEXT)[0], lab.prompts[0]
    computed = np.asarray(lab.blend(0, cached, Setting("random", 0.3, first=2, stages=1)).computed)
    first = prompt.candidate & (prompt.offset < 2)
    assert first.sum() == 7  # one chunk has but one token
    assert computed[:, first].all()
    assert computed[-1, prompt.candidate].sum() == 29  # of 96


def test_a_run_compares_settings(tmp_path, capsys):
    passages = [{"title": "A", "text": "the cat sat on the mat and slept"}, {"text": "a dog ran"}]
    rows = [{"question": f"who ran {i}?", "answers": ["dog"], "ctxs": passages} for i in range(3)]
    data, out = tmp_path / "data.json", tmp_path / "out.json"
    data.write_text(json.dumps(rows))
    options = f"--model {HF / 'llama3'} --data {data} --words 5 --limit 2 --json {out}".split()
    report = main([*options, "--selectors", "query", "random", "--ratios", "0.3", "--mass", "1", "0.5"])
    assert json.loads(out.read_text()) == report
    lines = report["results"]
    assert [line["setting"] for line in lines] == ["reuse", "query 0.3", "query 0.3 mass 0.5", "random 0.3"]
    for line in lines:
        kl = line["kl_by_prompt"]
        halves = [line["first_half"]["kl"], line["second_half"]["kl"]]
        assert halves == pytest.approx(kl)
        assert line["all"]["kl"] == pytest.approx(np.mean(kl))
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split()[:2] == ["plain", "reuse"]
    assert len(printed) == 6


def test_what_is_recovered_is_a_share_of_what_plain_reuse_loses(lab, monkeypatch):
    monkeypatch.setattr("scripts.selection_lab.named_context", lambda name: "" if name == "plain" else TEXT)
    plain, after = compare(lab, ["plain", "after"], [])
    assert compare(lab, ["after"], []) == [after]
    assert plain["all"]["recovered"] == 0
    assert after["all"]["recovered"] == pytest.approx(1 - after["all"]["kl"] / plain["all"]["kl"])
    assert after["all"]["kl"] != plain["all"]["kl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratios 1.5", r"recompute_ratio must be in \[0, 1\], got 1.5"),
        ("--check-layers 6", r"check_layer must be in \[1, 5\]"),
        ("--taper 2", r"taper must be in \[0, 1\], got 2"),
        ("--first -1", "first must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(CacheBlendError, match=message):
        settings_of(parse(options.split()), family_model("gemma3").config)


def test_passages_are_cut_after_whole_words():
    assert first_words("A title\nand  a text", 3) == "A title\nand"
    assert first_words("two words ", 2) == first_words("two words ", None) == "two words "


def test_layers_that_are_apart_are_stacked():
    params = family_model("gemma3").params
    apart = Params(params.embedder, jax.tree.map(lambda leaf: tuple(leaf), params.layers))
    assert apart.by_layer
    jax.tree.map(np.testing.assert_array_equal, stacked(apart), params)
    apart.take_apart(joined_by_layer(family_model("gemma3").config))
    assert apart.joined
    jax.tree.map(np.testing.assert_array_equal, stacked(apart), params)
