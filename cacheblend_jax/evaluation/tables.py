"""Results as text: what the commands print, one function for each, without a line break at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheblend_jax.engine.profile import ASSUMED_DISK, Profile
from cacheblend_jax.evaluation.bench import BenchReport
from cacheblend_jax.evaluation.check_layer import CheckLayer
from cacheblend_jax.evaluation.demo import DemoAnswers, WorkedExample
from cacheblend_jax.evaluation.inspection import Inspection
from cacheblend_jax.evaluation.summary import of_all_kinds


def summary_table(summary: Sequence[dict[str, Any]]) -> str:
    """Returns an evaluation's summary (see `summarize`): a block for each kind of question, a line for each setting.

    Intervals are of 95 %. Columns of what was not measured are left out.
    """
    columns = [column for column in SUMMARY_COLUMNS if any(line.get(column.measure) is not None for line in summary)]
    text = []
    for kind in dict.fromkeys(line["kind"] for line in summary):
        lines = [line for line in summary if line["kind"] == kind]
        text.append(f"{kind}: {lines[0]['rows']} questions")
        text.append(f"  {'setting':22}" + "".join(f"{column.title:>{column.width}}" for column in columns))
        text += [f"  {line['setting']:22}" + "".join(column.cell(line) for column in columns) for line in lines]
    return "\n".join(text)


def inspection_table(found: Inspection) -> str:
    """Returns an inspection: a line for each mode, and what reuse and blend are from full recompute."""
    lines = [f"{'mode':8}{'reused':>8}{'recomputed':>12}  answer"]
    for mode, answer in found.answers.items():
        stats = answer.stats.prefill
        recomputed = stats.forced + round(stats.recompute_ratio * stats.candidates)
        lines.append(f"{mode:8}{stats.reused:8}{recomputed:12}  {' '.join(answer.text.split())[:80]}")
    deviation, paid = found.mean_deviation(), {mode: found.cross_attention_share(mode) for mode in ("reuse", "blend")}
    lines.append(f"KV deviation of the reused tokens: reuse {deviation['reuse']:.3g}, blend {deviation['blend']:.3g}")
    if np.isfinite(paid["reuse"]):
        lines.append(
            f"attention between chunks, of full recompute's: reuse {paid['reuse']:.0%}, blend {paid['blend']:.0%}"
        )
    lines.append(f"rank correlation of neighbouring layers' deviations: {found.mean_neighbour_correlation():.2f}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """A column of the summary: a measure, its title, and how a number is written."""

    measure: str
    title: str
    form: str
    scale: float = 1.0
    with_interval: bool = False

    @property
    def width(self) -> int:
        """Characters, blanks before it included."""
        return 25 if self.with_interval else max(len(self.title), 6) + 2

    def cell(self, line: dict[str, Any]) -> str:
        """Returns what stands in a setting's line."""
        if line.get(self.measure) is None:
            return " " * self.width
        text = self._number(line[self.measure])
        if self.with_interval:
            low, high = (self._number(end) for end in line[f"{self.measure}_interval"])
            text += f" [{low}, {high}]"
        return f"{text:>{self.width}}"

    def _number(self, value: float) -> str:
        return format(value * self.scale, self.form)


SUMMARY_COLUMNS = (
    Column("kl", "KL a token", ".4f", with_interval=True),
    Column("recovered", "of reuse's loss recovered", ".0%", with_interval=True),
    Column("kl_difference", "KL, difference", "+.4f", with_interval=True),
    Column("first_kl", "first KL", ".4f"),
    Column("nll_difference", "NLL +", ".4f"),
    Column("agreement", "agreement", ".3f"),
    Column("exact_match", "exact match", ".3f"),
    Column("f1", "F1", ".3f"),
    Column("rouge_l", "Rouge-L", ".3f"),
    Column("kv_deviation", "KV dev.", ".4f"),
    Column("attention_deviation", "attn dev.", ".4f"),
    Column("ttft_s", "TTFT ms", ".1f", scale=1e3),
    Column("flops", "GFLOP", ".1f", scale=1e-9),
    Column("recomputed", "recomputed", ".1f"),
)


def check_layer_table(measured: CheckLayer) -> str:
    """Returns what speaks for each layer as the check layer: a line for each layer but the first."""
    text = [f"{'layer':>5}{'finds what deviates above':>27}{'top 15 % hold':>15}{'rank correlation with the next':>32}"]
    for layer in range(1, len(measured.scores)):
        score = "" if np.isnan(measured.scores[layer]) else f"{measured.scores[layer]:.2f}"
        has_next = layer - 1 < len(measured.neighbour_correlation)
        correlation = f"{measured.neighbour_correlation[layer - 1]:32.2f}" if has_next else ""
        text.append(f"{layer:5}{score:>27}{measured.concentration[layer - 1]:15.2f}{correlation}")
    return "\n".join(text)


def bench_table(report: BenchReport) -> str:
    """Returns the timings: a line for each length and mode, then how many programs each length compiled."""
    text = [
        f"{'tokens':>7} {'mode':12}{'TTFT ms':>10}{'±':>7}{'speed-up':>10}{'ideal':>7}{'efficiency':>12}"
        f"{'host':>7}{'load':>7}{'compile s':>11}{'peak GB':>9}"
    ]
    for row in report.rows:
        line = f"{row['tokens']:7} {row['mode']:12}{row['ttft_s'] * 1e3:10.1f}{row['spread_s'] * 1e3:7.1f}"
        if "speed_up" in row:
            line += (
                f"{row['speed_up']:9.2f}x{row['ideal_speed_up']:6.2f}x{row['efficiency']:12.3f}"
                f"{row['host_share']:7.1%}{row['load_share']:7.1%}{row['compile_s']:11.1f}"
                f"{row['peak_memory_bytes'] / 1e9:9.2f}"
            )
        text.append(line)
    for row in report.rows:
        if row["mode"] == "full":
            text.append(
                f"{row['tokens']} tokens: {row['programs']} programs compiled; "
                f"{row['compiles_after_warmup']} more for the rounds and for another prompt"
            )
        if "over_torch" in row:
            text.append(f"full / torch at {row['tokens']} tokens: {row['over_torch']:.2f}")
    return "\n".join(text)


def demo_table(answers: DemoAnswers) -> str:
    """Returns the demo's answers: a line for each setting."""
    questions = len(answers.rows)
    text = [
        f"{questions} questions to records of a company, prompts of about {answers.records[0]['tokens']} tokens; "
        f"blend recomputes {answers.ratio:.0%}",
        f"{'mode':14}{'right':>9}{'KV dev.':>10}{'attn dev.':>11}{'TTFT ms':>10}{'recomputed':>13}",
    ]
    for label, line in of_all_kinds(answers.summary).items():
        right = f"{round(line['exact_match'] * questions)}/{questions}"
        deviations = f"{line['kv_deviation']:10.4f}{line['attention_deviation']:11.4f}"
        text.append(f"{label:14}{right:>9}{deviations}{line['ttft_s'] * 1e3:10.1f}{line['recomputed']:9.0f} tok")
    return "\n".join(text)


def worked_example_text(example: WorkedExample) -> str:
    """Returns a question, the sentences that answer it, and each setting's answer."""
    text = [f"For instance: {example.question}"]
    text += [f"  chunk {number}: … {sentence} …" for number, sentence in example.evidence]
    text += [f"  {label:14}{answer}" for label, answer in example.answers.items()]
    return "\n".join(text)


def profile_text(profile: Profile) -> str:
    """Returns what a calibration found: the layers' costs, how well they fit, and each tier's speed."""
    compute, fit = profile.compute, profile.fit
    text = [
        f"a layer takes {compute.layer_s * 1e3:.3f} ms + {compute.key_s * 1e6:.3f} us/key + "
        f"{compute.projected_s * 1e6:.3f} us/row projected + {compute.attending_s * 1e6:.3f} us/row attending + "
        f"{compute.visible_s * 1e9:.3f} ns/pair; a request {compute.request_s * 1e3:.1f} ms",
        f"fit over {fit['layer_steps']} layer steps: error {fit['median_error']:.1%} in the median, "
        f"{fit['worst_error']:.1%} at worst",
    ]
    ways = [profile.transfer] if profile.pageable is None else [profile.transfer, profile.pageable]
    for tier in (*profile.tiers.values(), *ways):
        assumed = " (assumed, not measured)" if tier is ASSUMED_DISK else ""
        text.append(f"{tier.name}: {tier.bytes_per_s / 1e9:.2f} GB/s, {tier.latency_s * 1e6:.0f} us a read{assumed}")
    text.append(f"page cache: {fit['page_cache']}")
    return "\n".join(text)
