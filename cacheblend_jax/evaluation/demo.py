"""`demo`: a dozen questions to the bundled model, in every mode, and how far each is from full recompute; offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cacheblend_jax.evaluation.corpus import KINDS, Difficulty, examples
from cacheblend_jax.evaluation.datasets import SEED, Row
from cacheblend_jax.evaluation.evaluate import Evaluator, Progress, Setting, summarize
from cacheblend_jax.model import Model

QUESTIONS = {"single": 2, "reference": 7, "compare": 3}
# Chunks of one length: all prompts fall into one bucket, so that little time goes into compiling.
DIFFICULTY = Difficulty(num_chunks=(8, 8), chunk_words=(48, 58))
SELECTORS = ("hkvd", "cross", "query", "epic", "random")
RATIO = 0.15


def demo_rows() -> list[Row]:
    """The demo's questions: most need two chunks."""
    return [
        Row(f"{kind}/{number}", kind, drawn.chunks, drawn.question.text, (drawn.question.answer,))
        for kind in KINDS
        for number, drawn in enumerate(examples(kind, QUESTIONS[kind], SEED + 1, DIFFICULTY))
    ]


def run_demo(parsed: argparse.Namespace, model: Model, progress: Progress) -> dict[str, Any]:
    """Asks, prints the table and one worked example, draws the plots asked for; returns what `--json` writes."""
    rows = demo_rows()
    settings = [Setting(mode) for mode in ("full", "prefix", "reuse")]
    settings += [Setting("blend", selector, RATIO) for selector in SELECTORS]
    evaluator = Evaluator(model, rows, max_new_tokens=4, with_rouge=False)
    evaluator.evaluate_row(rows[0], settings[:1])
    # Compiles the rest, several at a time.
    evaluator.warmup(rows[0], settings[1:])
    records = [record for row in progress(rows, "ask") for record in evaluator.evaluate_row(row, settings)]
    summary = summarize(records, [setting.label for setting in settings])
    overall = {line["setting"]: line for line in summary if line["kind"] == "all"}
    _print_table(overall, len(rows), records[0]["tokens"])
    _print_example(rows, records)
    if parsed.plot is not None:
        from cacheblend_jax.evaluation import plots

        sweep = [Setting("full"), Setting("reuse")]
        sweep += [Setting("blend", name, ratio) for name in ("hkvd", "random") for ratio in plots.CURVE_RATIOS]
        more = [record for row in progress(rows, "curve") for record in evaluator.evaluate_row(row, sweep)]
        curve = summarize(more, [setting.label for setting in sweep])
        plots.save_all(parsed.plot, sweep, curve, evaluator, next(row for row in rows if row.kind == "reference"))
    return {"questions": len(rows), "summary": summary, "records": records}


def _print_table(overall: dict[str, dict[str, Any]], questions: int, tokens: int) -> None:
    print(
        f"{questions} questions to records of a company, prompts of about {tokens} tokens; blend recomputes {RATIO:.0%}"
    )
    print(f"{'mode':14}{'right':>9}{'KV dev.':>10}{'attn dev.':>11}{'TTFT ms':>10}{'recomputed':>13}")
    for label, line in overall.items():
        right = f"{round(line['exact_match'] * questions)}/{questions}"
        deviations = f"{line['kv_deviation']:10.4f}{line['attention_deviation']:11.4f}"
        print(f"{label:14}{right:>9}{deviations}{line['ttft_s'] * 1e3:10.1f}{line['recomputed']:9.0f} tok")


def _print_example(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> None:
    """The first question of two chunks that reuse gets wrong and blend right, with the sentences that answer it."""
    answers = {(record["row"], record["setting"]): record for record in records}
    blend = Setting("blend", "hkvd", RATIO).label
    telling = [
        row
        for row in rows
        if row.kind == "reference"
        and answers[row.name, blend]["exact_match"] > answers[row.name, "reuse"]["exact_match"]
    ]
    row = telling[0] if telling else next(row for row in rows if row.kind == "reference")
    print(f"\nFor instance: {row.question}")
    for number, sentence in _evidence(row):
        print(f"  chunk {number}: … {sentence} …")
    for record in records:
        if record["row"] == row.name:
            print(f"  {record['setting']:14}{record['answer']}")


def _evidence(row: Row) -> list[tuple[int, str]]:
    """The sentences that a reader needs: whose nickname it is, and what is told of the nickname."""
    sentences = [(i, text.strip(" .")) for i, chunk in enumerate(row.chunks) for text in chunk.split(". ")]
    asked = row.question.strip("?").split()[-1]
    definition = next((i, text) for i, text in sentences if text.split()[0] == asked)
    nickname = definition[1].split()[-1]
    told = ((i, text) for i, text in sentences if text.endswith(f" {nickname}") and row.answers[0] in text)
    return [definition, *told]
