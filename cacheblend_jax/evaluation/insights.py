"""What the paper observes of KV deviation, as functions to check it with; and from it, a model's check layer.

All take the deviation of stand-alone KV from full prefill's, `[layers, candidates]`: exactly what a blend would measure
at each layer, were it the check layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.evaluation.metrics import kv_deviation_by_layer, rank_correlation

TOP_SHARE = 0.15
GOOD_ENOUGH = 0.9  # of the best layer's score


def standalone_deviation(engine: Engine, prompt: Prompt) -> np.ndarray:
    """Returns float32 `[layers, candidates]`: how far each candidate's stand-alone KV is from full prefill's."""
    engine.precompute(prompt)
    full, reused = engine.prefill(prompt, "full"), engine.prefill(prompt, "reuse")
    deviation = np.asarray(kv_deviation_by_layer(reused.padded_cache, full.padded_cache, full.token_ids.size))
    candidate = ~reused.recomputed[-1]
    candidate[: reused.stats.exact] = False  # exact tokens lead the prompt
    return deviation[:, : candidate.size][:, candidate]


def concentration(deviation: np.ndarray, share: float = TOP_SHARE) -> np.ndarray:
    """Share of each layer's total deviation that its highest `share` of tokens hold, `[layers]`. Paper's figure 7.

    `share` itself would be an even spread; a layer without deviation gives NaN.
    """
    count = max(1, round(share * deviation.shape[1]))
    highest = np.sort(deviation, axis=1)[:, -count:].sum(axis=1)
    total = deviation.sum(axis=1)
    return np.divide(highest, total, out=np.full(len(total), np.nan), where=total > 0)


def neighbour_correlation(deviation: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each layer's deviation with the next one's, `[layers - 1]`. Paper's figure 8."""
    return np.array([rank_correlation(*pair) for pair in pairwise(deviation)])


def check_layer_scores(deviations: Sequence[np.ndarray], share: float = TOP_SHARE) -> np.ndarray:
    """How well each layer's deviation finds the tokens that deviate above it, `[layers]`, in [0, 1].

    The deviation (summed over the layers above) that the highest `share` of tokens by this layer's deviation hold,
    over the most that so many tokens can hold; mean over prompts. NaN for layer 0 and the last.
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
    """The lowest layer whose score comes near the best one's; 1 for a model too shallow to choose."""
    if np.all(np.isnan(scores)):
        return 1
    return int(np.flatnonzero(scores >= GOOD_ENOUGH * np.nanmax(scores))[0])
