"""A decoding batch on the device: prefilled prompts go into its slots, and blocks of tokens come out of all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to
from cacheblend_jax.engine.generation import angles_of
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.model.kv_cache import KVCache, abstract_cache
from cacheblend_jax.model.logprobs import TokenLogprobs, logprobs_of
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.sampling import Draw, Sampling, next_token
from cacheblend_jax.model.slots import NONE, DecodedSlots, Slots, Turn, decode_slots, empty_slots, insert
from cacheblend_jax.runtime.placing import changed_part, placed
from cacheblend_jax.runtime.programs import Prepared, shapes_of


@dataclass(frozen=True)
class Ending:
    """When an answer ends: before any of the stop tokens, or with `most` tokens."""

    stop_token_ids: frozenset[int]
    most: int

    def reason(self, token_id: int, number: int) -> str | None:
        """Returns why an answer ends with its token `number`, counted from 1; `None` if it goes on."""
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if number >= self.most else None


@dataclass(frozen=True)
class Block:
    """Tokens of one answer that were decoded together, with the log-probabilities of each, or without any."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


class SlotBatch:
    """The slots of one scheduler; used by its thread alone.

    Args:
        num_slots: how many answers are decoded together.
        capacity: how many tokens, of prompt and answer, a slot has room for.

    Attributes:
        num_groups: how many groups of devices have slots of their own, as many each; else all devices have all slots.
    """

    def __init__(self, model: Model, buckets: Buckets, num_slots: int, capacity: int) -> None:
        self._model, self._buckets = model, buckets
        self.num_slots, self.capacity = num_slots, capacity
        self._owners = (model,) if num_slots % len(model.groups) else model.groups
        self.num_groups = len(self._owners)
        self._slots_each = num_slots // self.num_groups
        self._angles = angles_of(model, capacity)
        self._slots: Slots | None = None
        self._shapes: dict[int, Slots] = {}

    def group_of(self, slot: int) -> int | None:
        """Returns the number of the group of devices that has a slot; `None` where all have it."""
        return slot // self._slots_each if self.num_groups > 1 else None

    def warm_up(self) -> None:
        """Compiles what inserts prompts of every padded length, and what decodes; allocates the slots."""
        for size in buckets_up_to(self._buckets.length, self.capacity):
            self._prepare(size, with_logprobs=False)
        self.decode({}, 1)

    def preparation(self, length: int, *, with_logprobs: bool = False) -> Callable[[], Prepared] | None:
        """Returns what compiles the programs for a prompt of `length` tokens, in any thread; `None`: they are ready."""
        size = self._buckets.length(length)
        if self._model.runner.is_prepared(self._name(size, with_logprobs)):
            return None
        return partial(self._prepare, size, with_logprobs)

    def _prepare(self, size: int, with_logprobs: bool) -> Prepared:
        over_shapes = partial(self._run_over_shapes, size, with_logprobs)
        return self._model.runner.prepare(self._name(size, with_logprobs), over_shapes)

    def _name(self, size: int, with_logprobs: bool) -> Hashable:
        return insert, self.num_slots, self.capacity, size, with_logprobs

    def _run_over_shapes(self, size: int, with_logprobs: bool, run: Callable[..., Any]) -> None:
        """Does what the methods below do, with `run` in the runner's place."""
        model = self._model
        run(next_token, np.zeros(model.config.vocab_size, np.float32), Draw.by(Sampling()), np.int32(0))
        slots = run(empty_slots, shapes_of(self._angles), config=model.config, num_slots=self.num_slots)
        slots = _where_it_is(model, slots)
        for group, owner in enumerate(self._owners):
            cache = abstract_cache(model.config, size, owner.cache_placement)
            turn = self._turn(0, 0, Ending(frozenset(), 1), Sampling())
            self._insert(owner.runner, self._own_slots(group), cache, turn, 0)
        self._decode(run, slots, np.zeros(self.num_slots, bool), 1, with_logprobs)

    def first_token(self, out: PrefillResult, sampling: Sampling, *, with_logprobs: bool = False) -> Block:
        """Returns the token that a prefill's logits give."""
        token = out.next_token
        if sampling.temperature > 0:
            token = int(self._model.runner(next_token, out.logits, Draw.by(sampling), np.int32(0)))
        return Block([token], [logprobs_of(out.logits, token)] if with_logprobs else [])

    def insert(self, slot: int, out: PrefillResult, token: int, ending: Ending, sampling: Sampling) -> None:
        """Puts a prefilled prompt whose answer goes on after its first token into a slot.

        No KV moves between devices where the slot is the group's that has prefilled it.
        """
        group, place = divmod(slot, self._slots_each)
        owner, turn = self._owners[group], self._turn(token, out.token_ids.size, ending, sampling)
        cache = placed(out.padded_cache, owner.cache_placement)
        slots, self._slots = self._state(), None  # lost where the program fails
        insert_into = partial(self._insert, owner.runner, cache=cache, turn=turn, slot=place)
        self._slots = changed_part(slots, self._own_slots(group), insert_into)

    def _own_slots(self, group: int) -> Slots:
        """Returns the shapes and placements of the slots that a group has, by themselves."""
        if group not in self._shapes:
            owner = self._owners[group]
            angles = shapes_of(self._angles, owner.placement)
            slots = owner.runner(empty_slots, angles, config=owner.config, num_slots=self._slots_each)
            self._shapes[group] = _where_it_is(owner, slots)
        return self._shapes[group]

    def decode(self, running: Collection[int], steps: int, *, with_logprobs: bool = False) -> list[Block]:
        """Decodes up to `steps` tokens of the slots that run; returns each slot's."""
        goes_on = np.isin(np.arange(self.num_slots), list(running))
        slots, self._slots = self._state(), None
        decoded = self._decode(self._model.runner, slots, goes_on, steps, with_logprobs)
        token_ids, rows = jax.device_get((decoded.token_ids, decoded.logprobs))
        self._slots = decoded.slots
        blocks = []
        for slot, column in enumerate(token_ids.T):
            tokens = [int(token) for token in column if token != NONE]
            blocks.append(Block(tokens, [rows.of_token(step, slot) for step in range(len(tokens))] if rows else []))
        return blocks

    @staticmethod
    def _insert(run: Callable[..., Any], slots: Slots, cache: KVCache, turn: Turn, slot: int) -> Slots:
        return run(insert, slots, cache, turn, np.int32(slot), donate=("slots",))

    def _decode(
        self, run: Callable[..., Any], slots: Slots, goes_on: np.ndarray, steps: int, with_logprobs: bool
    ) -> DecodedSlots:
        arrays = self._model.params, slots, goes_on, np.int32(steps), self._angles
        static = {"config": self._model.config, "with_logprobs": with_logprobs}
        return run(decode_slots, *arrays, donate=("slots",), **static)

    def _state(self) -> Slots:
        """Returns the slots; empty ones at first, and after a program that failed has taken their buffers."""
        if self._slots is None:
            model = self._model
            slots = model.runner(empty_slots, self._angles, config=model.config, num_slots=self.num_slots)
            self._slots = _where_it_is(model, slots)
        return self._slots

    def _turn(self, token: int, length: int, ending: Ending, sampling: Sampling) -> Turn:
        is_stop = np.isin(np.arange(self._model.config.vocab_size), list(ending.stop_token_ids))
        token_id, position, number, left = (np.int32(each) for each in (token, length, 1, ending.most - 1))
        return Turn(token_id, position, number, left, is_stop, Draw.by(sampling))


def _where_it_is(model: Model, slots: Slots) -> Slots:
    """Returns empty slots, or their shapes, on the model's devices.

    They depend on no array's values, so that a program for one device makes them on the default one.
    """
    if model.partition is not None:
        return slots
    if isinstance(jax.tree.leaves(slots)[0], jax.ShapeDtypeStruct):
        return shapes_of(slots, model.placement)
    return jax.device_put(slots, model.placement)
