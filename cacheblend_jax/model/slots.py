"""Decoding many answers together: slots, filled one at a time, take every step at once.

The pattern is JetStream's: prefill one prompt, insert its cache into a free slot, decode all slots. A step reads the
weights once for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.decode import MOST_AT_ONCE, run_rows
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.logprobs import LogprobRows
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sampling import Draw, HostOrDevice, Sampling, next_tokens
from cacheblend_jax.model.slot_cache import SlotCache
from cacheblend_jax.model.transformer import embedder
from pallas_kernels.partition import by_shares, constrained, current_partition, rows_called

NONE = -1  # in a token's place: the slot was idle


@struct.dataclass
class Turn:
    """Where an answer stands, and how it goes on: of one answer as scalars, or of all slots.

    Attributes:
        token_id: its last token, which no layer has seen yet.
        position: that token's place.
        number: how many tokens the answer has.
        left: how many it may still get; 0: the slot is idle.
        is_stop: the tokens that end it.
        draw: how its tokens are drawn.
    """

    token_id: Int[HostOrDevice, "*slots"]
    position: Int[HostOrDevice, "*slots"]
    number: Int[HostOrDevice, "*slots"]
    left: Int[HostOrDevice, "*slots"]
    is_stop: Bool[HostOrDevice, "*slots vocab"]
    draw: Draw


@struct.dataclass
class Slots:
    """The state of a decoding batch, which stays on the device."""

    cache: SlotCache
    turn: Turn


class DecodedSlots(NamedTuple):
    """What `decode_slots` returns: each step's tokens, `NONE` for slots that were idle and after the last step."""

    token_ids: Int[Array, "most_at_once slots"]
    logprobs: LogprobRows | None
    slots: Slots


def empty_slots(angles: Angles, *, config: ModelConfig, num_slots: int) -> Slots:
    """Returns slots that are all idle, each with room for the tokens that `angles` are of (traceable)."""
    zeros = jnp.zeros(num_slots, jnp.int32)
    draws = jax.tree.map(lambda x: jnp.zeros(num_slots, x.dtype), Draw.by(Sampling()))
    turn = Turn(zeros, zeros, zeros, zeros, jnp.zeros((num_slots, config.vocab_size), bool), draws)
    return Slots(SlotCache.empty(config, num_slots, angles.num_tokens), turn)


def insert(slots: Slots, cache: KVCache, turn: Turn, slot: Int[Array, ""]) -> Slots:
    """Puts a prefilled prompt into a slot (traceable); callers donate `slots`.

    Args:
        cache: its blended KV; what it holds beyond the prompt's tokens is never seen.
        turn: the answer's, after its first token.
    """
    turns = jax.tree.map(lambda all_slots, one: all_slots.at[slot].set(one), slots.turn, turn)
    return Slots(slots.cache.with_slot(slot, cache), turns)


def decode_slots(
    params: Params,
    slots: Slots,
    goes_on: Bool[Array, " slots"],
    limit: Int[Array, ""],
    angles: Angles,
    *,
    config: ModelConfig,
    with_logprobs: bool = False,
) -> DecodedSlots:
    """Decodes up to `limit` tokens of each slot, at most `MOST_AT_ONCE` (traceable); callers donate `slots`.

    An answer that has met a stop token, or has all its tokens, is idle from then on; so is one that doesn't go on.

    Args:
        with_logprobs: whether log-probabilities come with the tokens. They take time in every step.
    """

    def is_busy(state: tuple[Int[Array, ""], DecodedSlots]) -> Bool[Array, ""]:
        count, decoded = state
        return (count < jnp.minimum(limit, MOST_AT_ONCE)) & (decoded.slots.turn.left > 0).any()

    def step(state: tuple[Int[Array, ""], DecodedSlots]) -> tuple[Int[Array, ""], DecodedSlots]:
        count, (token_ids, logprobs, slots) = state
        token, logits, slots = _one_step(params, slots, angles, config)
        if logprobs is not None:
            row = LogprobRows.of(logits, jnp.maximum(token, 0))
            logprobs = logprobs.with_row(count, jax.tree.map(constrained, row))
        return count + 1, DecodedSlots(token_ids.at[count].set(token), logprobs, slots)

    turn = slots.turn
    slots = replace(slots, turn=replace(turn, left=jnp.where(goes_on, turn.left, 0)))
    none = jnp.full((MOST_AT_ONCE, goes_on.shape[0]), NONE, jnp.int32)
    rows = LogprobRows.empty(MOST_AT_ONCE, goes_on.shape[0], config.vocab_size) if with_logprobs else None
    return lax.while_loop(is_busy, step, (jnp.int32(0), DecodedSlots(none, rows, slots)))[1]


def _one_step(
    params: Params, slots: Slots, angles: Angles, config: ModelConfig
) -> tuple[Int[Array, " slots"], Float[Array, "slots vocab"], Slots]:
    """Returns each slot's next token, `NONE` where it is idle, the logits that it was drawn from, and the slots."""
    with rows_called(slots.cache.rows_axis(current_partition())):
        return _step_of_rows(params, slots, angles, config)


def _step_of_rows(
    params: Params, slots: Slots, angles: Angles, config: ModelConfig
) -> tuple[Int[Array, " slots"], Float[Array, "slots vocab"], Slots]:
    turn = slots.turn
    runs = turn.left > 0
    positions = jnp.where(runs, turn.position, slots.cache.capacity)  # idle slots write nothing and see nothing
    hidden, cache = run_rows(params, slots.cache, turn.token_id, positions, angles, config=config)
    logits = embedder(params, config).logits(hidden)
    draw = replace(turn.draw, temperature=jnp.where(runs, turn.draw.temperature, 0))
    drawn = by_shares(next_tokens, [("rows",)] * 3, ("rows",))(logits, draw, turn.number)
    token = constrained(jnp.where(runs, drawn, turn.token_id))
    ends = jnp.take_along_axis(turn.is_stop, token[:, None], axis=1)[:, 0]
    after = replace(
        turn,
        token_id=token,
        position=turn.position + runs,
        number=turn.number + runs,
        left=jnp.where(runs & ~ends, turn.left - 1, 0),
    )
    return jnp.where(runs, token, NONE), logits, Slots(cache, after)
