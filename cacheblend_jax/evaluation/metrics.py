"""Metrics: how good an answer is, how near a prefill comes to full recompute, and how certain a mean is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import log_softmax
from scipy.stats import bootstrap, spearmanr

from cacheblend_jax.blend.deviation import relative_squared_distance
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.kv_cache import KVCache


def normalize_answer(text: str) -> str:
    """Returns a text in lower case, without punctuation, articles and extra blanks. Source: SQuAD's script."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the prediction is one of the answers after normalisation, else 0."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best F1 of normalised words over the answers, in [0, 1]; two empty texts agree."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best Rouge-L F-measure over the answers, in [0, 1].

    Raises:
        CacheBlendError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise CacheBlendError(
            f"Rouge-L needs rouge-score: pip install 'cacheblend-jax[evaluation]' ({error})"
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max(scorer.score(answer, prediction)["rougeL"].fmeasure for answer in answers)


@dataclass(frozen=True)
class ContinuationDistance:
    """How far a prefill's distributions over a given continuation are from full recompute's (teacher-forced).

    Attributes:
        kl: KL(full ‖ other) in nats, of each token's distribution: float64 `[tokens]`.
        nll_difference: negative log-likelihood of the continuation, other minus full, in nats, the mean over tokens.
        agreement: share of the tokens whose likeliest candidate is the same.
    """

    kl: np.ndarray
    nll_difference: float
    agreement: float


def continuation_distance(
    logits: Float[np.ndarray, "tokens vocab"],
    reference: Float[np.ndarray, "tokens vocab"],
    token_ids: Int[np.ndarray, " tokens"],
) -> ContinuationDistance:
    """Compares the logits that each token of a continuation is drawn from with full recompute's, the `reference`."""
    log_q, log_p = log_softmax(logits.astype(np.float64), axis=1), log_softmax(reference.astype(np.float64), axis=1)
    each = np.arange(token_ids.size), token_ids
    return ContinuationDistance(
        np.sum(np.exp(log_p) * (log_p - log_q), axis=1),
        float(np.mean(log_p[each] - log_q[each])),
        float(np.mean(logits.argmax(axis=1) == reference.argmax(axis=1))),
    )


@jax.jit
def kv_deviation_by_layer(
    cache: KVCache, reference: KVCache, length: Int[Array, ""] | int
) -> Float[Array, "layers tokens"]:
    """Returns the KV deviation of each layer and token from another cache of the same prompt (a full prefill's).

    Both caches may be padded beyond `length`; padding gives zeros. Keys are rotated in both, which leaves distances as
    they are. The scale is that of the selectors' deviation: squared L2, K plus V, each over its layer's mean squared
    norm in `reference`.
    """
    valid = jnp.arange(cache.k.shape[1]) < length

    def of_layer(k: jax.Array, v: jax.Array, k_true: jax.Array, v_true: jax.Array) -> jax.Array:
        deviation = relative_squared_distance(k_true, k, valid) + relative_squared_distance(v_true, v, valid)
        return jnp.where(valid, deviation, 0.0)

    return jax.vmap(of_layer)(cache.k, cache.v, reference.k, reference.v)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Spearman's rank correlation of two rows of numbers; NaN where one is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def bootstrap_interval(
    *samples: Sequence[float] | np.ndarray, statistic: Callable[..., Any] = np.mean, level: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap's confidence interval of a statistic: the same for the same values.

    Args:
        samples: of equal length; what stands at the same place is drawn together (paired).
        statistic: takes the samples and `axis`.
    """
    arrays = tuple(np.asarray(sample, np.float64) for sample in samples)
    if arrays[0].size < 2:
        only = float(statistic(*arrays, axis=0))
        return only, only
    drawn = bootstrap(
        arrays,
        statistic,
        n_resamples=2000,
        confidence_level=level,
        method="percentile",
        paired=True,
        rng=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
