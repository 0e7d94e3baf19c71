"""The steps of a planned prefill, written once for both executors: begin, layer, border, question pass, logits.

The resident executor scans them inside one program, the streamed one calls each as a program of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.layer_step import (
    LayerKV,
    Sequence,
    Step,
    Survivors,
    cross_mass,
    highest,
    last_row,
    layer_step,
)
from cacheblend_jax.blend.selectors import Evidence, get_selector
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import Params, Rows, embedder, layer_starts, rows_at
from pallas_kernels import attention_mass


@struct.dataclass
class Request:
    """A prefill's traced half. Active tokens are those that are not exact; padding rows have `positions` = keys."""

    token_ids: Int[Array, " active"]
    positions: Int[Array, " active"]
    length: Int[Array, ""]
    forced: Bool[Array, " active"]
    chunk_starts: Int[Array, " active"]
    context_length: Int[Array, ""]
    keep: Int[Array, " borders"]  # survivors of each border but the last, forced ones included
    forced_rows: Int[Array, " forced"]  # indices into the active tokens; `active` is padding
    is_question: Bool[Array, " forced"]
    oracle: Float[Array, " active"]
    seed: Int[Array, ""]


@struct.dataclass
class Prefilled:
    """What a prefill returns: logits, the greedy next token, the blended cache, and each stage's tokens."""

    logits: Float[Array, " vocab"]
    next_token: Int[Array, ""]
    k: Float[Array, "layers keys kv_heads head_dim"]  # rotated
    v: Float[Array, "layers keys kv_heads head_dim"]
    stage_positions: tuple[Int[Array, " rows"], ...]


@struct.dataclass
class Known:
    """What a border knows of all active tokens, besides the K, V that its layer has just computed."""

    forced: Bool[Array, " active"]
    chunk_starts: Int[Array, " active"]
    oracle: Float[Array, " active"]
    seed: Int[Array, ""]
    cross_mass: Float[Array, " active"]
    question_mass: Float[Array, " active"]


@struct.dataclass
class Current:
    """The rows that are still computed, and the place of each among the active tokens."""

    rows: Rows
    index: Int[Array, " rows"]


def begin(params: Params, config: ModelConfig, request: Request, sequence: Sequence) -> tuple[Current, LayerKV]:
    """Embeds the active tokens; returns them, and the empty blended cache, `[layers, keys, kv_heads, head_dim]`."""
    hidden = embedder(params, config).embed(request.token_ids)
    # Written into a buffer of its own: one that is read and overwritten in turn would be copied whole between stages.
    empty = jnp.zeros((config.num_layers, sequence.cos.shape[0], config.num_kv_heads, config.head_dim), hidden.dtype)
    rows = rows_at(hidden, request.positions, sequence.cos, sequence.sin)
    index = jnp.arange(request.positions.shape[0], dtype=jnp.int32)
    return Current(rows, index), LayerKV(empty, empty)


def known_of(request: Request, question_mass: Float[Array, " keys"] | None) -> Known:
    """Returns what is known before the first layer: `question_mass` of every key, where a selector asked for it."""
    zeros = jnp.zeros(request.positions.shape[0], jnp.float32)
    if question_mass is None:
        of_active = zeros
    else:
        of_active = question_mass[jnp.minimum(request.positions, question_mass.shape[0] - 1)]
    return Known(request.forced, request.chunk_starts, request.oracle, request.seed, zeros, of_active)


def advance(
    params: Params,
    config: ModelConfig,
    index: Int[Array, ""] | int,
    current: Current,
    cached: LayerKV | None,
    blended: LayerKV,
    sequence: Sequence,
    narrow: Callable[[LayerKV], Survivors] | None = None,
) -> tuple[Current, LayerKV, Step]:
    """Takes layer `index`, whose cached KV is `cached`, and writes its blended KV into the whole cache's."""
    step = layer_step(params, config, index, current.rows, cached, sequence, narrow)
    blended = jax.tree.map(lambda stack, x: lax.dynamic_update_index_in_dim(stack, x, index, 0), blended, step.blended)
    return Current(step.rows, current.index[step.kept]), blended, step


def to_survivors(
    current: Current,
    cached: LayerKV,
    known: Known,
    keep: Int[Array, ""],
    *,
    room: int,
    selector: str,
    deviation: str,
) -> Callable[[LayerKV], Survivors]:
    """Returns the narrowing of a border: the `keep` rows (in `room` places) that the selector scores highest."""

    def narrow(fresh: LayerKV) -> Survivors:
        evidence = evidence_of(fresh, cached, current, known, deviation)
        scores = get_selector(selector).score(evidence)
        return highest(scores, known.forced[current.index], evidence.valid, keep, room)

    return narrow


def to_last_row(current: Current, sequence: Sequence) -> Callable[[LayerKV], Survivors]:
    """Returns the narrowing of the last layer: the prompt's last token alone goes on."""
    return lambda fresh: last_row(current.rows, sequence)


def evidence_of(fresh: LayerKV, cached: LayerKV, current: Current, known: Known, deviation: str) -> Evidence:
    """Returns what a selector is shown: what is known of the current rows, and this layer's K, V."""
    positions, index, num_keys = current.rows.positions, current.index, cached.k.shape[0]
    at = jnp.minimum(positions, num_keys - 1)
    return Evidence(
        valid=positions < num_keys,
        positions=positions,
        chunk_starts=known.chunk_starts[index],
        index=index,
        k_fresh=fresh.k,
        v_fresh=fresh.v,
        k_cached=cached.k[at],
        v_cached=cached.v[at],
        cross_mass=known.cross_mass[index],
        question_mass=known.question_mass[index],
        oracle=known.oracle[index],
        seed=known.seed,
        part=deviation,
    )


def cross_mass_of(
    config: ModelConfig,
    index: Int[Array, ""] | int,
    step: Step,
    positions: Int[Array, " active"],
    known: Known,
    context_length: Int[Array, ""],
    sequence: Sequence,
) -> Float[Array, " active"]:
    """Returns the attention that layer `index`'s step paid to other chunks, for all active tokens."""
    starts = layer_starts(config, index, positions)
    return cross_mass(step, known.chunk_starts, context_length, sequence, starts)


def needs(selector: str | None, evidence: str) -> bool:
    """Whether the selector asks for that costly evidence."""
    return selector is not None and evidence in get_selector(selector).needs


def begin_question_pass(request: Request, current: Current, sequence: Sequence) -> tuple[Rows, Float[Array, " keys"]]:
    """Returns the rows of the question pass, the forced tokens, and the attention paid so far: none."""
    num_active, num_keys = request.token_ids.shape[0], sequence.cos.shape[0]
    is_row = request.forced_rows < num_active
    at = jnp.minimum(request.forced_rows, num_active - 1)
    return current.rows.take(at, is_row, num_keys), jnp.zeros(num_keys, jnp.float32)


def question_step(
    params: Params,
    config: ModelConfig,
    index: Int[Array, ""] | int,
    rows: Rows,
    mass: Float[Array, " keys"],
    cached: LayerKV,
    is_question: Bool[Array, " forced"],
    sequence: Sequence,
) -> tuple[Rows, Float[Array, " keys"]]:
    """One layer of the question pass: adds the attention that the question pays to every key.

    The pass writes no cache: it is full KV reuse, watched.
    """
    with jax.named_scope("question_pass"):
        step = layer_step(params, config, index, rows, cached, sequence)
        starts = layer_starts(config, index, rows.positions)
        lse = jnp.where(is_question[:, None], step.lse, -jnp.inf)
        mass += attention_mass(step.q, step.blended.k, lse, rows.positions, q_starts=starts, kv_length=sequence.length)
        return step.rows, mass


def logits_of(params: Params, config: ModelConfig, rows: Rows) -> tuple[Float[Array, " vocab"], Int[Array, ""]]:
    """Returns the next token's logits after the one row that is left, and the likeliest token."""
    logits = embedder(params, config).logits(rows.hidden)[0]
    return logits, jnp.argmax(logits).astype(jnp.int32)
