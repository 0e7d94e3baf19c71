"""`evaluate`: quality of modes, selectors and ratios on a data set, each beside full recompute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.choices import CONTINUATION_TOKENS
from cacheblend_jax.evaluation.datasets import BUNDLED, digest_of
from cacheblend_jax.evaluation.evaluator import Evaluator, rows_for
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.results_file import ResultsFile
from cacheblend_jax.evaluation.settings import Setting, settings_for
from cacheblend_jax.evaluation.summary import summarize
from cacheblend_jax.model import Model


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: how many were asked.
        settings: in which they were answered.
        records: one for each row and setting, see `Evaluator.evaluate_row`.
        summary: their means, see `summarize`.
        deviation: float32 `[layers, candidates]`, how far the KV of the first row's chunks, computed apart, is from
            full recompute; `None` where it was not asked for.
        chunk_lengths: the tokens of each of these chunks.
        skipped: the rows that were not asked, by name, each with the reason: longer than the model takes, say.
    """

    rows: int
    settings: list[Setting]
    records: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    deviation: np.ndarray | None = None
    chunk_lengths: tuple[int, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


def evaluate(
    model: Model,
    settings: Sequence[Setting] | None = None,
    *,
    data_set: str = BUNDLED,
    limit: int | None = None,
    chunk_tokens: int = 512,
    max_new_tokens: int = 16,
    continuation: str = "full",
    continuation_tokens: int = CONTINUATION_TOKENS,
    against: str | None = None,
    system: str | None = None,
    out: str | Path | None = None,
    layer_deviations: bool = False,
    with_deviation: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Answers a data set's questions in every setting and compares each answer with full recompute.

    Args:
        settings: what `settings_for` returns, by default without arguments.
        data_set: `"bundled"`, or a file: see `load_rows`.
        limit: at most so many rows; of the bundled corpus, of each kind of question (200 where it is `None`).
        chunk_tokens: longest chunk of LongBench's texts.
        max_new_tokens: longest answer.
        continuation, continuation_tokens, layer_deviations: see `Evaluator`.
        against: the label of a setting that all others are compared with, see `summarize`.
        system: text before the chunks; `None`: the tokenizer's own, or a general one.
        out: keeps the records, as JSON lines. What another run has left there is not computed again.
        with_deviation: also measures `Evaluation.deviation`, which `plots.draw` takes.

    Raises:
        CacheBlendError: the model has no tokenizer, the data set or `out` cannot be read, `out` holds results of
            something else, no prompt fits the model, it cannot have a setting's check layer, or a package is missing.
    """
    settings = settings_for() if settings is None else list(settings)
    rows = rows_for(model, data_set, limit=limit, chunk_tokens=chunk_tokens)
    labels = [setting.label for setting in settings]
    summarize([], labels, against)  # a label that is none of the settings' is named before any work
    measures: dict[str, Any] = {"max_new_tokens": max_new_tokens, "continuation": continuation}
    measures |= {"continuation_tokens": continuation_tokens, "layer_deviations": layer_deviations, "system": system}
    with Evaluator(model, rows, **measures) as evaluator:
        for setting in settings:
            evaluator.engine(setting)  # one that the model cannot have is named before any work, too
        header = {
            "model": model.fingerprint,
            "check layer": model.config.check_layer,
            "data": data_set,
            "data's content": digest_of(data_set, chunk_tokens),
            **measures,
        }
        rows = evaluator.rows
        results = ResultsFile(out, header)
        done = results.done()
        missing = {row.name: [each for each in settings if (row.name, each.label) not in done] for row in rows}
        unfinished = [row for row in rows if missing[row.name]]
        for row in progress(evaluator.by_size(unfinished), "evaluate"):
            results.add(evaluator.evaluate_row(row, missing[row.name]))
        deviation = evaluator.standalone_deviation(rows[0]) if with_deviation else None
        chunk_lengths = evaluator.chunk_lengths(rows[0]) if with_deviation else ()
    records = [record for record in results.records if record["row"] in missing and record["setting"] in labels]
    summary = summarize(records, labels, against)
    return Evaluation(len(rows), settings, records, summary, deviation, chunk_lengths, evaluator.skipped)
