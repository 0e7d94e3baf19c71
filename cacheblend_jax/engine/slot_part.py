"""Slots that are decoded together, in one thread: their state on the device, and the programs that change it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from cacheblend_jax.engine.generation import angles_of
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.model.kv_cache import KVCache, abstract_cache
from cacheblend_jax.model.logprobs import LogprobRows
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.slots import DecodedSlots, Slots, Turn, decode_slots, empty_slots, insert
from cacheblend_jax.runtime.placing import changed_part, placed
from cacheblend_jax.runtime.programs import shapes_of


class DecodedBlock(NamedTuple):
    """The tokens of each step and slot, on the host, `NONE` where a slot was idle, and their log-probabilities."""

    token_ids: Int[np.ndarray, "steps slots"]
    logprobs: LogprobRows | None


class SlotPart:
    """Slots that one program decodes at a time, on all groups of the model's devices that have some of them.

    Args:
        num_slots: how many; they are counted from 0.
        capacity: how many tokens a slot has room for.

    Attributes:
        slots_each: how many slots each group of devices has: all where the groups can't have as many each.
    """

    def __init__(self, model: Model, num_slots: int, capacity: int) -> None:
        self._model, self.num_slots = model, num_slots
        self._owners = (model,) if num_slots % len(model.groups) else model.groups
        self.slots_each = num_slots // len(self._owners)
        self._angles = angles_of(model, capacity)
        self._slots: Slots | None = None
        self._shapes: dict[int, Slots] = {}

    def run_over_shapes(self, run: Callable[..., Any], size: int, turn: Turn, *, with_logprobs: bool) -> None:
        """Does what the methods below do, with `run` in the runner's place, for a prefill's cache of `size` tokens."""
        model = self._model
        slots = run(empty_slots, shapes_of(self._angles), config=model.config, num_slots=self.num_slots)
        slots = _where_it_is(model, slots)
        for group, owner in enumerate(self._owners):
            cache = abstract_cache(model.config, size, owner.cache_placement)
            self._insert(owner.runner, self._own_slots(group), cache, turn, 0)
        self._decode(run, slots, np.zeros(self.num_slots, bool), 1, with_logprobs)

    def insert(self, slot: int, out: PrefillResult, turn: Turn) -> None:
        """Puts a prefilled prompt into a slot; no KV moves between devices if its group has prefilled it."""
        group, place = divmod(slot, self.slots_each)
        owner = self._owners[group]
        cache = placed(out.padded_cache, owner.cache_placement)
        slots, self._slots = self._state(), None  # lost where the program fails
        insert_into = partial(self._insert, owner.runner, cache=cache, turn=turn, slot=place)
        self._slots = changed_part(slots, self._own_slots(group), insert_into)

    def _own_slots(self, group: int) -> Slots:
        """Returns the shapes and placements of the slots that a group has, by themselves."""
        if group not in self._shapes:
            owner = self._owners[group]
            angles = shapes_of(self._angles, owner.placement)
            slots = owner.runner(empty_slots, angles, config=owner.config, num_slots=self.slots_each)
            self._shapes[group] = _where_it_is(owner, slots)
        return self._shapes[group]

    def decode(self, goes_on: Bool[np.ndarray, " slots"], steps: int, *, with_logprobs: bool) -> DecodedBlock:
        """Decodes up to `steps` tokens of the slots that go on."""
        slots, self._slots = self._state(), None
        decoded = self._decode(self._model.runner, slots, goes_on, steps, with_logprobs)
        block = DecodedBlock(*jax.device_get((decoded.token_ids, decoded.logprobs)))
        self._slots = decoded.slots
        return block

    @staticmethod
    def _insert(run: Callable[..., Any], slots: Slots, cache: KVCache, turn: Turn, slot: int) -> Slots:
        return run(insert, slots, cache, turn, np.int32(slot), donate=("slots",))

    def _decode(
        self,
        run: Callable[..., Any],
        slots: Slots,
        goes_on: Bool[np.ndarray, " slots"],
        steps: int,
        with_logprobs: bool,
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


def _where_it_is(model: Model, slots: Slots) -> Slots:
    """Returns empty slots, or their shapes, on the model's devices.

    They depend on no array's values, so that a program for one device makes them on the default one.
    """
    if model.partition is not None:
        return slots
    if isinstance(jax.tree.leaves(slots)[0], jax.ShapeDtypeStruct):
        return shapes_of(slots, model.placement)
    return jax.device_put(slots, model.placement)
