"""Evaluations: what blend restores, what an evaluation returns, and its pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation import plots
from cacheblend_jax.evaluation.check_layer import measure_check_layer
from cacheblend_jax.evaluation.corpus import KINDS, Difficulty, examples
from cacheblend_jax.evaluation.datasets import SEED, Row
from cacheblend_jax.evaluation.evaluate import evaluate
from cacheblend_jax.evaluation.evaluator import Evaluator
from cacheblend_jax.evaluation.settings import Setting, settings_for
from cacheblend_jax.evaluation.summary import MEANS, of_all_kinds, summarize
from cacheblend_jax.evaluation.tables import summary_table
from cacheblend_jax.model.demo import demo_directory

HKVD, RANDOM = Setting("blend", "hkvd", 0.15), Setting("blend", "random", 0.15)


@pytest.fixture(scope="module")
def demo():
    return cb.load_model("demo", dtype="float32")


@pytest.mark.once
@pytest.mark.usefixtures("optimised", "one_length")
def test_i8_blend_restores_what_reuse_loses_and_random_choice_does_not():
    """The point of it all, in small: fails where blend's advantage over reuse or over random is gone."""
    less = Setting("blend", "hkvd", 0.1)
    settings = [Setting("full"), Setting("reuse"), HKVD, less, RANDOM]
    difficulty = Difficulty(num_chunks=(7, 7), chunk_words=(48, 56))
    rows = [
        Row(f"reference/{i}", "reference", drawn.chunks, drawn.question.text, (drawn.question.answer,))
        for i, drawn in enumerate(examples("reference", 16, SEED, difficulty))
    ]
    options = {"max_new_tokens": 2, "continuation_tokens": 2, "layer_deviations": True}
    with Evaluator(cb.load_model("demo", dtype="float32"), rows, **options) as evaluator:
        records = [record for row in rows for record in evaluator.evaluate_row(row, settings)]
    lines = of_all_kinds(summarize(records, [setting.label for setting in settings]))
    right = {label: line["exact_match"] for label, line in lines.items()}
    assert right["full"] >= 0.95
    assert right[HKVD.label] >= right["full"] - 0.1
    assert right[less.label] >= right["full"] - 0.05
    assert right["reuse"] <= 0.6
    assert right[RANDOM.label] <= right[HKVD.label] - 0.2
    for measure, over_random in (("kv_deviation", 0.75), ("attention_deviation", 0.8)):
        hkvd, random, reuse = (lines[label][measure] for label in (HKVD.label, RANDOM.label, "reuse"))
        assert hkvd < over_random * random, measure
        assert random < reuse, measure
    assert lines[HKVD.label]["recovered"] > 0.7
    assert lines[RANDOM.label]["recovered"] < lines[less.label]["recovered"] + 0.1
    assert lines["full"]["kl"] == lines["full"]["nll_difference"] == lines["full"]["attention_deviation"] == 0.0
    assert (lines["full"]["recovered"], lines["full"]["agreement"], lines["reuse"]["recovered"]) == (1, 1, 0)


@pytest.mark.live
def test_live_transformers_loads_the_bundled_model_and_answers_the_same(demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32).eval()
    engine = cb.Engine(demo)
    for example in (example for kind in KINDS for example in examples(kind, 2, 11)):
        prompt = cb.Prompt.to_answer(demo.tokenizer, example.chunks, example.question.text)
        out = engine.prefill(prompt, "full")
        ids = torch.from_numpy(out.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = peer(ids, logits_to_keep=1).logits[0, -1].numpy()
        np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-3)
        answer = peer.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        ours = engine.complete(out, max_new_tokens=2, stop_token_ids=())
        assert answer.tolist() == ours.token_ids


def test_curves_are_of_one_setting_each():
    pytest.importorskip("matplotlib")
    settings = [Setting("blend", "hkvd", ratio, "kv", stages) for ratio in (0.3, 0.1) for stages in (1, 4)]
    measures = [dict.fromkeys(plots.CURVES, each.ratio) | {"exact_match_interval": (0, 1)} for each in settings]
    summary = [
        {"setting": each.label, "kind": "all"} | measured for each, measured in zip(settings, measures, strict=True)
    ]
    drawn = plots.quality_by_ratio(settings, summary).axes[0].get_lines()
    assert sorted(line.get_label() for line in drawn) == ["hkvd", "hkvd 1 stages"]
    assert all(line.get_xdata().tolist() == [0.1, 0.3] for line in drawn)


def test_where_no_row_fits_the_first_is_named(demo):
    row = Row("rows/7", "", ("a b " * 3000,), "Why?", ("x",))
    with pytest.raises(CacheBlendError, match="row rows/7: the prompt has"):
        Evaluator(demo, [row], max_new_tokens=2)


def test_rows_that_do_not_fit_are_skipped_and_named(demo, tmp_path, monkeypatch):
    def row(text: str) -> dict:
        return {"question": "Who?", "answers": ["x"], "ctxs": [{"text": text}]}

    def recorded(_, row, settings):
        means = dict.fromkeys((*MEANS, "kv_deviation_by_layer", "attention_deviation_by_layer"), 0.5)
        return [{"row": row.name, "kind": "", "setting": each.label} | means for each in settings]

    monkeypatch.setattr(Evaluator, "evaluate_row", recorded)
    monkeypatch.setattr(
        Evaluator, "standalone_deviation", lambda *_: np.random.default_rng(0).random((8, 30)).astype(np.float32)
    )
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a b"), row("a b " * 3000), row(""), row("b")]))
    found = evaluate(demo, [Setting("full")], data_set=str(path))
    assert (found.rows, [record["row"] for record in found.records]) == (2, ["rows/0", "rows/3"])
    assert list(found.skipped) == ["rows/1", "rows/2"]
    assert found.skipped["rows/1"].endswith("tokens, but the model takes at most 2048")
    assert "use fewer" not in found.skipped["rows/1"]
    assert measure_check_layer(demo, data_set=str(path)).skipped == found.skipped
    path.write_text(json.dumps([row("a b " * 3000)]))
    with pytest.raises(CacheBlendError, match=r"row rows/0: the prompt has .* takes at most 2048; none of the 1 rows"):
        evaluate(demo, data_set=str(path))


def test_warming_up_shows_how_far_it_has_come(demo, monkeypatch):
    shown = []
    monkeypatch.setattr(Evaluator, "evaluate_row", lambda *_: [])
    row = Row("rows/0", "", ("a b",), "Who?", ("x",))
    with Evaluator(demo, [row], max_new_tokens=2) as evaluator:
        evaluator.warmup(row, [HKVD, RANDOM], lambda items, what: shown.append((what, len(items))) or items)
    assert shown == [("compile", 2)]


@pytest.mark.usefixtures("one_length")
def test_an_evaluation_is_a_call_that_prints_nothing(demo, tmp_path, capsys):
    settings = settings_for(modes=("full", "blend"), selectors=("hkvd",))
    seen = []

    def progress(items, what):
        for item in items:
            seen.append((what, item.name))
            yield item

    options = {"limit": 1, "max_new_tokens": 2, "out": tmp_path / "results.jsonl", "progress": progress}
    found = evaluate(demo, settings, with_deviation=True, **options)
    assert capsys.readouterr() == ("", "")
    assert sorted(seen) == [("evaluate", f"{kind}/0") for kind in sorted(KINDS)]
    assert found.rows == len(KINDS)
    assert [(line["setting"], line["rows"]) for line in found.summary if line["kind"] == "all"] == [
        ("full", 3),
        ("hkvd 0.15", 3),
    ]
    assert found.deviation.shape[0] == demo.config.num_layers
    table = summary_table(found.summary)
    assert table.startswith("all: 3 questions\n")
    assert table.count("hkvd 0.15") == len(KINDS) + 1
    again = evaluate(demo, settings, **options)  # all of it is in the file
    assert (len(seen), again.records, again.deviation) == (3, found.records, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ("fast",)}, "unknown mode 'fast'; known: full, prefix, reuse, blend"),
        ({"selectors": ("best",)}, "unknown selector 'best'"),
        ({"ratios": (1.5,)}, "recompute_ratio must be in"),
        ({"num_stages": (0,)}, "num_stages must be"),
    ],
)
def test_settings_that_make_no_sense_are_named_before_any_work(options, message):
    with pytest.raises(CacheBlendError, match=message):
        settings_for(**options)
