"""A decoding batch on the device: prefilled prompts go into its slots, and blocks of tokens come out of all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to
from cacheblend_jax.engine.loading import submit_or_run
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.engine.slot_part import DecodedBlock, SlotPart
from cacheblend_jax.model.logprobs import TokenLogprobs, logprobs_of
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.sampling import Draw, Sampling, next_token
from cacheblend_jax.model.slots import NONE, Turn
from cacheblend_jax.runtime.programs import Prepared


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
    """The slots of one scheduler. One thread at a time inserts or decodes.

    On a CPU with several cores they are in parts, each decoded by a thread: a step of a few rows keeps only one core
    busy. Those of a model with large weights stay in one part: each part would read all of them.

    Args:
        num_slots: how many answers are decoded together.
        capacity: how many tokens, of prompt and answer, a slot has room for.
        num_parts: how many parts at most; 1 where several groups of devices have slots of their own.

    Attributes:
        num_groups: how many groups of devices have slots of their own, as many each; else all devices have all slots.
    """

    def __init__(self, model: Model, buckets: Buckets, num_slots: int, capacity: int, num_parts: int = 1) -> None:
        self._model, self._buckets = model, buckets
        self.num_slots, self.capacity = num_slots, capacity
        count = 1 if model.takes_layers else min(num_parts, num_slots)
        self._parts = [SlotPart(model, len(range(part, num_slots, count)), capacity) for part in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="cacheblend-decode") if count > 1 else None
        self._slots_each = self._parts[0].slots_each if count == 1 else num_slots
        self.num_groups = num_slots // self._slots_each

    def group_of(self, slot: int) -> int | None:
        """Returns the number of the group of devices that has a slot; `None` where all have it."""
        return slot // self._slots_each if self.num_groups > 1 else None

    def part_of(self, slot: int) -> int:
        """Returns the number of the slots that a slot is decoded with."""
        group = self.group_of(slot)
        return slot % len(self._parts) if group is None else group

    def close(self) -> None:
        """Ends its threads. It decodes no more."""
        if self._threads is not None:
            self._threads.shutdown()

    def warm_up(self) -> None:
        """Compiles what inserts prompts of every padded length, and what decodes; allocates the slots."""
        for size in buckets_up_to(self._buckets.length, self.capacity):
            self._prepare(size, with_logprobs=False)
        for part in self._parts:
            part.decode(np.zeros(part.num_slots, bool), 1, with_logprobs=False)

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
        return SlotBatch, self.num_slots, len(self._parts), self.capacity, size, with_logprobs

    def _run_over_shapes(self, size: int, with_logprobs: bool, run: Callable[..., Any]) -> None:
        """Does what the methods below do, with `run` in the runner's place."""
        run(next_token, np.zeros(self._model.config.vocab_size, np.float32), Draw.by(Sampling()), np.int32(0))
        turn = self._turn(0, 0, Ending(frozenset(), 1), Sampling())
        for part in {part.num_slots: part for part in self._parts}.values():
            part.run_over_shapes(run, size, turn, with_logprobs=with_logprobs)

    def first_token(self, out: PrefillResult, sampling: Sampling, *, with_logprobs: bool = False) -> Block:
        """Returns the token that a prefill's logits give."""
        token = out.next_token
        if sampling.temperature > 0:
            token = int(self._model.runner(next_token, out.logits, Draw.by(sampling), np.int32(0)))
        return Block([token], [logprobs_of(out.logits, token)] if with_logprobs else [])

    def insert(self, slot: int, out: PrefillResult, token: int, ending: Ending, sampling: Sampling) -> None:
        """Puts a prefilled prompt whose answer goes on after its first token into a slot."""
        place, part = divmod(slot, len(self._parts))
        self._parts[part].insert(place, out, self._turn(token, out.token_ids.size, ending, sampling))

    def decode(self, running: Collection[int], steps: int, *, with_logprobs: bool = False) -> list[Block]:
        """Decodes up to `steps` tokens of the slots that run; returns each slot's."""
        goes_on = np.isin(np.arange(self.num_slots), list(running))
        count = len(self._parts)
        busy = [part for part in range(count) if goes_on[part::count].any()]

        def decode(part: int) -> DecodedBlock:
            return self._parts[part].decode(goes_on[part::count], steps, with_logprobs=with_logprobs)

        if self._threads is None or len(busy) < 2:
            decoded = [decode(part) for part in busy]
        else:
            futures = [submit_or_run(self._threads, decode, part) for part in busy]
            wait(futures)  # for all of them, also where one fails: each has its part's buffers
            decoded = [future.result() for future in futures]
        blocks = [Block([], [])] * self.num_slots
        for part, block in zip(busy, decoded, strict=True):
            blocks[part::count] = _by_slot(block)
        return blocks

    def _turn(self, token: int, length: int, ending: Ending, sampling: Sampling) -> Turn:
        is_stop = np.isin(np.arange(self._model.config.vocab_size), list(ending.stop_token_ids))
        token_id, position, number, left = (np.int32(each) for each in (token, length, 1, ending.most - 1))
        return Turn(token_id, position, number, left, is_stop, Draw.by(sampling))


def _by_slot(block: DecodedBlock) -> list[Block]:
    blocks, rows = [], block.logprobs
    for slot, column in enumerate(block.token_ids.T):
        tokens = [int(token) for token in column if token != NONE]
        blocks.append(Block(tokens, [rows.of_token(step, slot) for step in range(len(tokens))] if rows else []))
    return blocks
