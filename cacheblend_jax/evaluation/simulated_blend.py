"""Blends simulated densely, to compare ways to select tokens: every layer computes all, and masks decide what counts.

A simulated blend takes as long as a full prefill, whatever it recomputes, but how it selects is an argument of one
program, not a shape: trying one more setting compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.deviation import kv_deviation
from cacheblend_jax.blend.layer_step import HostOrDevice, PromptSequence, layer_step
from cacheblend_jax.blend.resident import standalone
from cacheblend_jax.blend.schedule import TAPER, layer_groups, num_chosen, stage_ratios
from cacheblend_jax.choices import CONTINUATION_TOKENS
from cacheblend_jax.engine import Engine, Prompt
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.evaluation.evaluator import through_stop
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.transformer import Attended, Rows, attend, embedder, layer_at, layer_starts, rows_at
from pallas_kernels import apply_rope, attention_mass

SIZE_STEP = 16  # prompts, chunks and questions are padded to a multiple of it


@struct.dataclass
class ChunkPlaces:
    """Where each token of a prompt comes from.

    Attributes:
        chunk, offset: each candidate's chunk, and its place there; of others, zeros.
        chunks: token ids of each chunk, padded.
    """

    chunk: Int[HostOrDevice, " keys"]
    offset: Int[HostOrDevice, " keys"]
    chunks: Int[HostOrDevice, "chunks chunk_tokens"]


@struct.dataclass
class DensePrompt(ChunkPlaces):
    """A prompt with the answer that it is scored on, padded as others are.

    Attributes:
        token_ids: of the prompt and its answer.
        length: of both together.
        candidate: the chunks' tokens. All others are computed at every layer.
        measured: the tokens of chunks and question, whose mean norm is the unit of deviation, as in an engine.
        question: positions of the question's tokens; padding is the number of keys.
        scored: positions that the answer's tokens are predicted at; padding repeats the last.
        num_scored: how many they are.
        drawn: a random number for each token, in [0, 1).
    """

    token_ids: Int[HostOrDevice, " keys"]
    length: Int[HostOrDevice, ""]
    candidate: Bool[HostOrDevice, " keys"]
    measured: Bool[HostOrDevice, " keys"]
    question: Int[HostOrDevice, " question"]
    scored: Int[HostOrDevice, " scored"]
    num_scored: Int[HostOrDevice, ""]
    drawn: Float[HostOrDevice, " keys"]


@struct.dataclass
class Choice:
    """A setting's traced half, for one prompt."""

    mass: Float[HostOrDevice, " keys"]
    mass_exponent: Float[HostOrDevice, ""]
    deviation_exponent: Float[HostOrDevice, ""]
    first: Int[HostOrDevice, ""]
    keep: Int[HostOrDevice, " layers"]


@struct.dataclass
class Simulated:
    """What a simulated blend returns.

    Attributes:
        logits: float32, what each of the answer's tokens is drawn from.
        computed: the tokens whose K, V each layer computed afresh.
        mass: attention that the question pays to each key, summed over layers; `None` where it was not asked for.
    """

    logits: Float[Array, "scored vocab"]
    computed: Bool[Array, "layers keys"]
    mass: Float[Array, " keys"] | None


@struct.dataclass
class Distance:
    """How far a simulated blend is from full recompute: see `evaluation.metrics.ContinuationDistance`."""

    kl: Float[Array, ""]
    first_kl: Float[Array, ""]
    agreement: Float[Array, ""]


def padded_size(count: int) -> int:
    """Returns what a number of tokens is padded to."""
    return -(-count // SIZE_STEP) * SIZE_STEP


def dense_prompts(
    tokenized: Sequence[TokenizedPrompt],
    answers: Sequence[list[int]],
    size: int,
    seed: int,
    scored: int = CONTINUATION_TOKENS,
) -> list[DensePrompt]:
    """Pads prompts of `size` keys or fewer with their answers of up to `scored` tokens, all to the same shapes."""
    most = max(len(parts.chunks) for parts in tokenized)
    longest = padded_size(max((ids.size for parts in tokenized for ids in parts.chunks), default=1))
    question = padded_size(max(parts.suffix.size for parts in tokenized))
    prompts = []
    for number, (parts, answer) in enumerate(zip(tokenized, answers, strict=True)):
        ids, chunks = parts.token_ids, np.zeros((max(most, 1), longest), np.int32)
        chunk, offset, candidate = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, bool)
        start = parts.prefix.size
        for i, each in enumerate(parts.chunks):
            chunks[i, : each.size] = each
            place = slice(start, start + each.size)
            chunk[place], offset[place], candidate[place] = i, np.arange(each.size), True
            start += each.size
        places = np.arange(size)
        in_question = np.full(question, size, np.int32)
        in_question[: ids.size - start] = np.arange(start, ids.size)
        last = ids.size + len(answer) - 2  # nothing is drawn after the answer's last token
        prompts.append(
            DensePrompt(
                token_ids=np.pad(np.append(ids, answer), (0, size - ids.size - len(answer))).astype(np.int32),
                length=np.int32(ids.size + len(answer)),
                candidate=candidate,
                measured=(places >= parts.prefix.size) & (places < ids.size),
                chunk=chunk,
                offset=offset,
                chunks=chunks,
                question=in_question,
                scored=np.minimum(ids.size - 1 + np.arange(scored, dtype=np.int32), last),
                num_scored=np.int32(len(answer)),
                drawn=np.random.default_rng([seed, number]).random(size, np.float32),
            )
        )
    return prompts


def greedy_answers(
    model: Model, tokenized: Sequence[TokenizedPrompt], size: int, tokens: int = CONTINUATION_TOKENS
) -> list[list[int]]:
    """Returns full recompute's answers, up to and with the first stop token; `size` is what prompts are padded to."""
    answers = []
    with Engine(model, length_buckets=(size,)) as engine:
        for parts in tokenized:
            full = engine.prefill(Prompt(parts.prefix, parts.chunks, parts.suffix), "full")
            ids = engine.complete(full, max_new_tokens=tokens, stop_token_ids=()).token_ids
            answers.append(through_stop(ids, model.stop_token_ids))
    return answers


def kept_by_layer(
    num_layers: int, candidates: int, ratio: float, check_layer: int = 1, stages: int = 4, taper: float = TAPER
) -> Int[np.ndarray, " layers"]:
    """Returns how many candidates go on from each layer to the next, as an engine plans it; at ratio 0 none do."""
    keep = np.full(num_layers, candidates if ratio else 0, np.int32)
    if ratio == 0 or check_layer >= num_layers - 1:
        return keep
    groups = layer_groups(num_layers, check_layer, stages)
    ratios = stage_ratios(ratio, [last - first + 1 for first, last in groups], taper)
    for (first, _), share in zip(groups, ratios, strict=True):
        keep[first - 1 :] = num_chosen(share, candidates)
    return keep


def full_logits(
    params: Params, prompt: DensePrompt, angles: Angles, *, config: ModelConfig
) -> Float[Array, "scored vocab"]:
    """Returns full recompute's logits of the answer's tokens."""
    sequence = PromptSequence(prompt.length, angles)

    def step(rows: Rows, index: jax.Array) -> tuple[Rows, None]:
        return layer_step(params, config, index, rows, None, sequence).rows, None

    rows, _ = lax.scan(step, _all_rows(params, prompt, angles, config), jnp.arange(config.num_layers))
    return embedder(params, config).logits(rows.hidden[prompt.scored])


def chunk_kv(
    params: Params,
    prompt: ChunkPlaces,
    context_ids: Int[Array, " context"],
    angles: Angles,
    embeddings: Float[HostOrDevice, "context hidden"] | None = None,
    *,
    config: ModelConfig,
    at_once: int = 1,
) -> KVCache:
    """Returns the KV of each chunk after the context alone, every token's at its place in the prompt; K before RoPE.

    What stands at other tokens' places means nothing.

    Args:
        angles: of the context's and the longest chunk's tokens.
        embeddings: as in `standalone`.
        at_once: chunks that are computed together.
    """
    start = jnp.asarray(context_ids.size, jnp.int32)
    context = None
    if context_ids.size:
        alone = PromptSequence(start, angles.take(slice(0, context_ids.size)))
        context = standalone(params, context_ids, None, jnp.zeros((), jnp.int32), alone, embeddings, config=config)
    sequence = PromptSequence(jnp.asarray(angles.num_tokens, jnp.int32), angles)
    of_chunk = jax.checkpoint(lambda ids: standalone(params, ids, context, start, sequence, config=config))
    # What gradients need is computed again.
    kv = lax.map(of_chunk, prompt.chunks, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, prompt.chunk, prompt.offset], kv)


def simulated_blend(
    params: Params,
    prompt: DensePrompt,
    cached: KVCache,
    choice: Choice,
    angles: Angles,
    *,
    config: ModelConfig,
    with_mass: bool = False,
) -> Simulated:
    """Runs all tokens through all layers; a token that was dropped lends later layers its cached K, V alone."""

    def step(state: tuple[Rows, jax.Array], index: jax.Array) -> tuple[tuple[Rows, jax.Array], tuple[Any, ...]]:
        rows, computed = state
        layer, stored = layer_at(params, config, index), cached.layer(index)
        q, *fresh_kv = layer.queries_keys_values(rows.hidden)
        fresh = LayerKV(*fresh_kv)
        k, v = (jnp.where(computed[:, None, None], *pair) for pair in ((fresh.k, stored.k), (fresh.v, stored.v)))
        compared = lax.stop_gradient((fresh.k, fresh.v, stored.k, stored.v))  # tokens are ranked by it, no more
        deviation = kv_deviation(*compared, computed & prompt.measured)
        kept = _survivors(prompt, choice, deviation, computed, choice.keep[index])
        turned, starts = angles.of_layer(config, index), layer_starts(config, index, rows.positions)
        kv = LayerKV(apply_rope(k, *turned), v)
        attended = attend(layer, rows, q, kv, angles=turned, starts=starts, kv_length=prompt.length)
        mass = _question_mass(prompt, attended, kv, starts, config) if with_mass else None
        return (attended.rows, kept), (computed, mass)

    rows = _all_rows(params, prompt, angles, config)
    start = rows, jnp.ones_like(prompt.candidate)
    # Gradients keep a layer's input alone, and compute the rest again.
    (rows, _), (computed, mass) = lax.scan(jax.checkpoint(step), start, jnp.arange(config.num_layers))
    logits = embedder(params, config).logits(rows.hidden[prompt.scored])
    return Simulated(logits, computed, None if mass is None else mass.sum(axis=0))


def distance(
    logits: Float[Array, "scored vocab"], reference: Float[Array, "scored vocab"], num_scored: Int[Array, ""]
) -> Distance:
    """Compares the answer's logits with full recompute's, the `reference`."""
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=1)
    scored = jnp.arange(kl.size) < num_scored
    agrees = scored & (logits.argmax(axis=1) == reference.argmax(axis=1))
    return Distance(jnp.where(scored, kl, 0.0).sum() / num_scored, kl[0], agrees.sum() / num_scored)


def _all_rows(params: Params, prompt: DensePrompt, angles: Angles, config: ModelConfig) -> Rows:
    positions = jnp.arange(prompt.token_ids.size, dtype=jnp.int32)
    return rows_at(embedder(params, config).embed(prompt.token_ids), positions, angles)


def _survivors(
    prompt: DensePrompt,
    choice: Choice,
    deviation: Float[Array, " keys"],
    computed: Bool[Array, " keys"],
    keep: Int[Array, ""],
) -> Bool[Array, " keys"]:
    """Returns which tokens go on: all but candidates, and the `keep` best of those candidates that are computed."""
    scores = choice.mass**choice.mass_exponent * deviation**choice.deviation_exponent
    scores = jnp.where(prompt.offset < choice.first, jnp.inf, scores)
    order = jnp.argsort(jnp.where(computed & prompt.candidate, -scores, jnp.inf))  # of equals, the earlier comes first
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return computed & (~prompt.candidate | (rank < keep))


def _question_mass(
    prompt: DensePrompt, attended: Attended, kv: LayerKV, starts: jax.Array | None, config: ModelConfig
) -> Float[Array, " keys"]:
    is_row = prompt.question < kv.k.shape[0]
    at = jnp.where(is_row, prompt.question, 0)
    return attention_mass(
        attended.q[at],
        kv.k,
        jnp.where(is_row[:, None], attended.lse[at], -jnp.inf),
        at,
        q_starts=None if starts is None else starts[at],
        kv_length=prompt.length,
        **config.score_options,
    )
