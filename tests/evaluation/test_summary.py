"""The summary: means, what a setting recovers of full KV reuse's loss, and the table of it."""

from __future__ import annotations

import pytest

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.summary import of_all_kinds, summarize
from cacheblend_jax.evaluation.tables import summary_table

REUSE = [0.4, 0.2, 0.6, 0.8]


def record(setting, row, kl):
    return {
        "row": f"rows/{row}",
        "kind": "",
        "setting": setting,
        "answer": "x",
        "exact_match": 1.0,
        "f1": 0.5,
        "rouge_l": None,
        "kl": kl,
        "first_kl": kl / 2,
        "nll_difference": kl,
        "agreement": 1.0,
        "ttft_s": 0.25,
        "flops": 3e9,
        "tokens": 100,
        "recomputed": 10.0,
    }


def records():
    by_setting = {"full": [0.0] * 4, "reuse": REUSE, "hkvd 0.15": [kl / 4 for kl in REUSE], "query 0.15": [0.1] * 4}
    return [record(setting, row, kl) for setting, each in by_setting.items() for row, kl in enumerate(each)]


LABELS = ["full", "reuse", "hkvd 0.15", "query 0.15"]


def test_what_a_setting_recovers_is_a_share_of_the_loss_of_reuse_over_the_same_rows():
    lines = of_all_kinds(summarize(records(), LABELS))
    assert {label: line["recovered"] for label, line in lines.items()} == {
        "full": 1.0,
        "reuse": 0.0,
        "hkvd 0.15": pytest.approx(0.75),
        "query 0.15": pytest.approx(0.8),
    }
    # hkvd keeps a quarter of every row's loss: drawn together with it, the share never varies.
    assert lines["hkvd 0.15"]["recovered_interval"] == (pytest.approx(0.75), pytest.approx(0.75))
    low, high = lines["query 0.15"]["recovered_interval"]
    assert low < 0.8 < high < 1
    low, high = lines["reuse"]["kl_interval"]
    assert low < 0.5 < high


def test_only_rows_that_both_settings_have_are_compared():
    partial = [each for each in records() if each["setting"] != "reuse" or each["row"] != "rows/3"]
    line = of_all_kinds(summarize(partial, LABELS))["query 0.15"]
    assert line["recovered"] == pytest.approx(1 - 0.1 / 0.4)


def test_settings_are_compared_with_another_one():
    lines = of_all_kinds(summarize(records(), LABELS, against="hkvd 0.15"))
    assert lines["query 0.15"]["kl_difference"] == pytest.approx(0.1 - 0.125)
    low, high = lines["query 0.15"]["kl_difference_interval"]
    assert low < -0.025 < high
    assert lines["hkvd 0.15"]["kl_difference_interval"] == (0.0, 0.0)
    with pytest.raises(CacheBlendError, match="--against 'best' is none of the settings: full, reuse, "):
        summarize(records(), LABELS, against="best")


def test_without_reuse_nothing_is_recovered_from_it():
    line = of_all_kinds(summarize(records(), ["full", "hkvd 0.15"]))["hkvd 0.15"]
    assert line["recovered"] is not None  # its records are there, though it is not among the lines
    alone = [each for each in records() if each["setting"] != "reuse"]
    line = of_all_kinds(summarize(alone, LABELS))["hkvd 0.15"]
    assert (line["recovered"], line["recovered_interval"]) == (None, None)


def test_the_table_leaves_out_what_was_not_measured():
    table = summary_table(summarize(records(), LABELS))
    head, *lines = table.splitlines()[1:]
    assert "Rouge-L" not in head
    assert "KV dev." not in head
    assert "KL, difference" not in head
    assert "of reuse's loss recovered" in head
    assert [line.split()[0] for line in lines] == ["full", "reuse", "hkvd", "query"]
    assert "75% [75%, 75%]" in lines[2]
    assert all(len(line) == len(head) for line in lines)
