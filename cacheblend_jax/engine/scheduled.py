"""A request on its way through a scheduler, and the slot that it is given."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.answer import Answer
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.engine.slot_batch import Block, Ending
from cacheblend_jax.model.sampling import Sampling


@dataclass(eq=False)
class ScheduledRequest:
    """A request on its way through the scheduler.

    Attributes:
        times_aside: how often it was set aside for something that had to be done first.
        logprobs: whether its tokens come with log-probabilities.
        compile_s: seconds of that which the compiler took.
        waited_s: seconds from its submission until it was prefilled, without those.
        num_tokens: of its answer, so far.
        pauses: whether its prefill lets the answers that run go on.
    """

    answer: Answer
    prompt: TokenizedPrompt
    length: int
    mode: str
    blend: BlendConfig | str | None
    sampling: Sampling
    ending: Ending
    logprobs: bool = False
    submitted_at: float = field(default_factory=time.perf_counter)
    times_aside: int = 0
    compile_s: float = 0.0
    waited_s: float = 0.0
    num_tokens: int = 0
    pauses: bool = False

    def take(self, block: Block) -> tuple[list[int], str | None]:
        """Counts the next tokens; returns those that its answer has, and why it ends with them, if it does."""
        token_ids = []
        for token in block.token_ids:
            self.num_tokens += 1
            reason = self.ending.reason(token, self.num_tokens)
            if reason != "stop":
                token_ids.append(token)
            if reason is not None:
                return token_ids, reason
        return token_ids, None


def free_slot(
    num_slots: int,
    group_of: Callable[[int], int | None],
    part_of: Callable[[int], int],
    lanes: int,
    *,
    running: Collection[int],
    prefilling: Collection[int],
) -> int | None:
    """Returns a free slot whose group of devices has a lane for one more prefill, if there is one.

    Parts with fewer answers come first, since a step takes as long as the part that has the most.

    Args:
        group_of: says which group of devices has a slot.
        part_of: says which slots are decoded with a slot, by the same devices or thread.
        lanes: how many prompts each group prefills at a time.
        running, prefilling: the slots that are taken.
    """
    in_lanes = Counter(map(group_of, prefilling))
    taken = {*running, *prefilling}
    busy = Counter(map(part_of, taken))
    free = [slot for slot in range(num_slots) if slot not in taken and in_lanes[group_of(slot)] < lanes]
    return min(free, key=lambda slot: (busy[part_of(slot)], slot), default=None)
