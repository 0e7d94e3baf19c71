"""`demo`: a dozen questions to the bundled model, in every mode, offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheblend_jax.evaluation.corpus import KINDS, Difficulty, examples
from cacheblend_jax.evaluation.datasets import SEED, Row
from cacheblend_jax.evaluation.evaluator import Evaluator
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.evaluation.summary import summarize
from cacheblend_jax.model import Model

QUESTIONS = {"single": 2, "reference": 7, "compare": 3}
# Chunks of about the same length: all prompts fall into one bucket, so that little time goes into compiling.
DIFFICULTY = Difficulty(num_chunks=(8, 8), chunk_words=(48, 58))
MAX_NEW_TOKENS = 4
SELECTORS = ("hkvd", "cross", "query", "epic", "random")
RATIO = 0.15
CURVE_SELECTORS = ("hkvd", "random")
CURVE_RATIOS = (0.05, 0.1, 0.15, 0.3, 0.5)


# A prompt to look at closely: the second chunk says where Cobalt moved, and only the first one who Cobalt is.
EXAMPLE_CHUNKS = (
    "On Monday the lobby opens at noon. Reyes took the nickname Cobalt. Novak is better known as Ridge.",
    "Oslo is now home to Cobalt. The printer near the hall is broken again. Lima is now home to Ridge.",
)
EXAMPLE_QUESTION = "In which city is the office of Reyes?"


@dataclass(frozen=True)
class DemoAnswers:
    """The demo's questions and how each mode answered them.

    Attributes:
        rows: the questions.
        records: one for each row and setting, see `Evaluator.evaluate_row`.
        summary: their means, see `summarize`.
        ratio: the recompute ratio of the settings that blend.
    """

    rows: list[Row]
    records: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    ratio: float = RATIO


@dataclass(frozen=True)
class RatioCurves:
    """What `plots.draw` takes: the demo's questions answered at several ratios, and one question's KV deviation."""

    settings: list[Setting]
    summary: list[dict[str, Any]]
    deviation: np.ndarray
    chunk_lengths: tuple[int, ...]


@dataclass(frozen=True)
class WorkedExample:
    """One question of the demo.

    Attributes:
        question: its text.
        evidence: the sentences that answer it, each with the number of its chunk.
        answers: by the setting's label.
    """

    question: str
    evidence: list[tuple[int, str]]
    answers: dict[str, str]


def demo_rows() -> list[Row]:
    """Returns the demo's questions: most need two chunks."""
    return [
        Row(f"{kind}/{number}", kind, drawn.chunks, drawn.question.text, (drawn.question.answer,))
        for kind in KINDS
        for number, drawn in enumerate(examples(kind, QUESTIONS[kind], SEED + 1, DIFFICULTY))
    ]


def demo(model: Model, *, progress: Progress = no_progress) -> DemoAnswers:
    """Asks the demo's questions in every mode, and with every selector.

    Args:
        model: the bundled one (`load_model("demo")`): no other can read this corpus.
    """
    rows = demo_rows()
    settings = [Setting(mode) for mode in ("full", "prefix", "reuse")]
    settings += [Setting("blend", selector, RATIO) for selector in SELECTORS]
    with _evaluator(model, rows) as evaluator:
        evaluator.warmup(rows[0], settings[:1], progress)  # what all settings share
        evaluator.warmup(rows[0], settings[1:], progress)
        records = _records(evaluator, rows, settings, progress, "ask")
    return DemoAnswers(rows, records, summarize(records, [setting.label for setting in settings]))


def ratio_curves(model: Model, *, progress: Progress = no_progress) -> RatioCurves:
    """Asks the demo's questions at several recompute ratios, by KV deviation and at random."""
    rows = demo_rows()
    settings = [Setting("full"), Setting("reuse")]
    settings += [Setting("blend", selector, ratio) for selector in CURVE_SELECTORS for ratio in CURVE_RATIOS]
    with _evaluator(model, rows) as evaluator:
        records = _records(evaluator, rows, settings, progress, "curve")
        row = next(row for row in rows if row.kind == "reference")
        deviation, lengths = evaluator.standalone_deviation(row), evaluator.chunk_lengths(row)
    return RatioCurves(settings, summarize(records, [setting.label for setting in settings]), deviation, lengths)


def worked_example(answers: DemoAnswers) -> WorkedExample:
    """Returns the first question about two chunks that `reuse` gets wrong and `blend` right, or else the first one."""
    by_row = {(record["row"], record["setting"]): record for record in answers.records}
    blend = Setting("blend", SELECTORS[0], answers.ratio).label
    references = [row for row in answers.rows if row.kind == "reference"]
    telling = [
        row for row in references if by_row[row.name, blend]["exact_match"] > by_row[row.name, "reuse"]["exact_match"]
    ]
    row = (telling or references)[0]
    own = {record["setting"]: record["answer"] for record in answers.records if record["row"] == row.name}
    return WorkedExample(row.question, _evidence(row), own)


def _evaluator(model: Model, rows: Sequence[Row]) -> Evaluator:
    return Evaluator(
        model, rows, max_new_tokens=MAX_NEW_TOKENS, continuation_tokens=1, with_rouge=False, layer_deviations=True
    )


def _records(
    evaluator: Evaluator, rows: Sequence[Row], settings: Sequence[Setting], progress: Progress, what: str
) -> list[dict[str, Any]]:
    return [record for row in progress(rows, what) for record in evaluator.evaluate_row(row, settings)]


def _evidence(row: Row) -> list[tuple[int, str]]:
    """The sentences that a reader needs: the one that gives the person a nickname, and those that use it."""
    sentences = [(i, text.strip(" .")) for i, chunk in enumerate(row.chunks) for text in chunk.split(". ")]
    person = row.question.strip("?").split()[-1]
    definition = next((i, text) for i, text in sentences if text.split()[0] == person)
    nickname = definition[1].split()[-1]
    uses = ((i, text) for i, text in sentences if text.endswith(f" {nickname}") and row.answers[0] in text)
    return [definition, *uses]
