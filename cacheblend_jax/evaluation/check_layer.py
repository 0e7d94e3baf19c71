"""The check layer: the lowest layer whose KV deviation tells which tokens deviate in the layers above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cacheblend_jax.evaluation.datasets import BUNDLED
from cacheblend_jax.evaluation.evaluator import Evaluator, rows_for
from cacheblend_jax.evaluation.insights import TOP_SHARE, concentration, neighbour_correlation
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.model import Model

GOOD_ENOUGH = 0.9  # of the best layer's score


@dataclass(frozen=True)
class CheckLayer:
    """A model's check layer, and what it was found by: means over prompts.

    Attributes:
        layer: the check layer.
        scores: float `[layers]`, see `check_layer_scores`.
        concentration: float `[layers - 1]`, from layer 1 on: see `insights.concentration`.
        neighbour_correlation: float `[layers - 2]`, from layer 1 on: see `insights.neighbour_correlation`.
        skipped: see `Evaluation`.
    """

    layer: int
    scores: np.ndarray
    concentration: np.ndarray
    neighbour_correlation: np.ndarray
    skipped: dict[str, str] = field(default_factory=dict)


def measure_check_layer(
    model: Model,
    *,
    data_set: str = BUNDLED,
    limit: int | None = None,
    chunk_tokens: int = 512,
    system: str | None = None,
    progress: Progress = no_progress,
) -> CheckLayer:
    """Finds the check layer by the KV deviation of a data set's prompts; the arguments are those of `evaluate`.

    `model.save_check_layer` saves it.

    Raises:
        CacheBlendError: the model has no tokenizer, the data set cannot be read, or no prompt fits the model.
    """
    rows = rows_for(model, data_set, limit=limit, chunk_tokens=chunk_tokens)
    with Evaluator(model, rows, max_new_tokens=1, system=system) as evaluator:
        deviations = [evaluator.standalone_deviation(row) for row in progress(evaluator.rows, "check layers")]
    scores = check_layer_scores(deviations)
    return CheckLayer(
        find_check_layer(scores),
        scores,
        np.nanmean([concentration(deviation)[1:] for deviation in deviations], axis=0),
        np.nanmean([neighbour_correlation(deviation[1:]) for deviation in deviations], axis=0),
        evaluator.skipped,
    )


def check_layer_scores(deviations: Sequence[np.ndarray], share: float = TOP_SHARE) -> np.ndarray:
    """Returns how well each layer's deviation finds the tokens that deviate above it, `[layers]`, in [0, 1].

    Of the deviation summed over the layers above, what is held by the `share` of tokens that deviate most at this
    layer, over the most that so many tokens can hold; the mean over prompts. NaN for layer 0 and the last.

    Args:
        deviations: of each prompt, `[layers, candidates]`: see `insights.standalone_deviation`.
    """
    return np.mean([_captured(deviation, share) for deviation in deviations], axis=0)


def _captured(deviation: np.ndarray, share: float) -> np.ndarray:
    layers, tokens = deviation.shape
    count = max(1, round(share * tokens))
    scores = np.full(layers, np.nan)
    for layer in range(1, layers - 1):
        above = deviation[layer + 1 :].sum(axis=0)
        picked = np.argsort(-deviation[layer], kind="stable")[:count]
        scores[layer] = above[picked].sum() / max(np.sort(above)[-count:].sum(), np.finfo(np.float32).tiny)
    return scores


def find_check_layer(scores: np.ndarray) -> int:
    """Returns the lowest layer whose score is near the best one's; 1 for a model too shallow to choose."""
    if np.all(np.isnan(scores)):
        return 1
    return int(np.flatnonzero(scores >= GOOD_ENOUGH * np.nanmax(scores))[0])
