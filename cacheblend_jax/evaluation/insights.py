"""What the paper observes of KV deviation, as functions that check whether it holds for a model.

All take the deviation of stand-alone KV from full prefill's, `[layers, candidates]`: exactly what a blend would measure
at each layer if that were the check layer.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float

from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.evaluation.metrics import kv_deviation_by_layer, rank_correlation

TOP_SHARE = 0.15  # of the tokens: as many as a blend recomputes by default


def standalone_deviation(engine: Engine, prompt: Prompt) -> np.ndarray:
    """Returns float32 `[layers, candidates]`: how far each candidate's stand-alone KV is from full prefill's."""
    engine.precompute(prompt)
    full, reused = engine.prefill(prompt, "full"), engine.prefill(prompt, "reuse")
    return token_deviation(reused, full)[:, candidates(reused)]


def token_deviation(out: PrefillResult, full: PrefillResult) -> Float[np.ndarray, "layers tokens"]:
    """Returns how far each token's KV is, at each layer, from full prefill's of the same prompt."""
    length = full.token_ids.size
    return np.asarray(kv_deviation_by_layer(out.padded_cache, full.padded_cache, length))[:, :length]


def candidates(reused: PrefillResult) -> Bool[np.ndarray, " tokens"]:
    """Returns which tokens' KV came from the store and is not exact at its place, from a prefill in mode `reuse`."""
    candidate = ~reused.recomputed[-1]
    candidate[: reused.stats.exact] = False  # exact tokens lead the prompt
    return candidate


def concentration(deviation: np.ndarray, share: float = TOP_SHARE) -> np.ndarray:
    """Returns what part of each layer's deviation is held by the `share` of tokens that deviate most, `[layers]`.

    An even spread gives `share` itself; a layer without deviation gives NaN. Source: CacheBlend, figure 7.
    """
    count = max(1, round(share * deviation.shape[1]))
    highest = np.sort(deviation, axis=1)[:, -count:].sum(axis=1)
    total = deviation.sum(axis=1)
    return np.divide(highest, total, out=np.full(len(total), np.nan), where=total > 0)


def neighbour_correlation(deviation: np.ndarray) -> np.ndarray:
    """Returns Spearman's rank correlation of each layer's deviation with the next layer's, `[layers - 1]`.

    Source: CacheBlend, figure 8.
    """
    return np.array([rank_correlation(*pair) for pair in pairwise(deviation)])
