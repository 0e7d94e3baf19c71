"""Metrics: how good an answer is, how near a prefill comes to full recompute, and how certain a mean is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import log_softmax
from scipy.stats import bootstrap, spearmanr

from cacheblend_jax.blend.deviation import relative_squared_distance
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles, rope_tables
from cacheblend_jax.model.transformer import Rows, attend, embedder, layer_at, layer_starts, rows_at, scan_layers

QUERY_PADDING = 32  # questions are padded to a multiple of it: few shapes to compile


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


def attention_deviation_by_layer(
    model: Model, token_ids: np.ndarray, first_query: int, cache: KVCache, reference: KVCache
) -> np.ndarray:
    """Returns the attention deviation of each layer, float32 `[layers]`.

    How far the attention of the question, the tokens from `first_query` on, is from full prefill's: the L2 distance of
    the two attention matrices (all heads) over the L2 norm of the true one. Both caches may be padded. Source:
    CacheBlend (arXiv 2405.16444) §4.2, definition 2.
    """
    keys, length = cache.k.shape[1], token_ids.size
    queries = -(-(length - first_query) // QUERY_PADDING) * QUERY_PADDING
    positions = np.full(queries, keys, np.int32)
    positions[: length - first_query] = np.arange(first_query, length)
    question = np.zeros(queries, np.int32)
    question[: length - first_query] = token_ids[first_query:]
    angles = rope_tables(model.config, keys)
    return np.asarray(
        _attention_deviation(model.params, model.config, question, positions, length, cache, reference, angles)
    )


@partial(jax.jit, static_argnames="config")
def _attention_deviation(
    params: Params,
    config: ModelConfig,
    question_ids: Int[Array, " queries"],
    positions: Int[Array, " queries"],
    length: Int[Array, ""] | int,
    cache: KVCache,
    reference: KVCache,
    angles: Angles,
) -> Float[Array, " layers"]:
    embedded = rows_at(embedder(params, config).embed(question_ids), positions, angles)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale

    def step(index: Int[Array, ""] | int, rows: Rows, kv: KVCache) -> tuple[Rows, jax.Array]:
        layer = layer_at(params, config, index)
        layer_kv = kv.layer(index)
        turned, starts = rows.angles.of_layer(config, index), layer_starts(config, index, rows.positions)
        q = layer.queries(rows.hidden)
        attended = attend(layer, rows, q, layer_kv, angles=turned, starts=starts, kv_length=length)
        q = attended.q * scale
        return attended.rows, _probabilities(q, layer_kv.k, attended.lse, rows.positions, starts, length)

    def both(carry: tuple[Rows, Rows], index: Int[Array, ""] | int) -> tuple[tuple[Rows, Rows], jax.Array]:
        rows, seen = step(index, carry[0], cache)
        true_rows, wanted = step(index, carry[1], reference)
        return (rows, true_rows), jnp.linalg.norm((seen - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())

    return scan_layers(params, both, (embedded, embedded), range(config.num_layers))[1]


def _probabilities(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    lse: Float[Array, "queries heads"],
    positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    length: Int[Array, ""] | int,
) -> Float[Array, "queries heads keys"]:
    """The attention matrix itself, of scaled queries: only for measuring, with few of them."""
    grouped = q.astype(jnp.float32).reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    scores = jnp.einsum("qhgd,khd->qhgk", grouped, k.astype(jnp.float32)).reshape(*q.shape[:2], k.shape[0])
    keys = jnp.arange(k.shape[0])[None, :]
    visible = (keys <= positions[:, None]) & (positions[:, None] < length)
    if starts is not None:
        visible &= keys >= starts[:, None]
    return jnp.where(visible[:, None], jnp.exp(scores - lse[..., None]), 0.0)


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
