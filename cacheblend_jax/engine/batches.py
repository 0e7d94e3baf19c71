"""Several prompts in one call: prefilled with shared reads, answered together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.prefilling import Prefiller
from cacheblend_jax.engine.prompt import Prompt, TokenizedPrompt
from cacheblend_jax.engine.results import Generation, PrefillResult
from cacheblend_jax.engine.scheduler import Scheduler
from cacheblend_jax.engine.scheduling import Prefills
from cacheblend_jax.engine.shared_reads import Opens, SharedReads
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.sampling import Sampling

# Of a batch's scheduler, which the memory of so many answers' KV allows on most devices; rounded up on several groups.
MOST_SLOTS = 8


@dataclass(frozen=True)
class BatchOfPrompts:
    """What a scheduler needs of an engine (`Prefills`), whose prefills share what they read.

    Attributes:
        check, prefill: the engine's, the latter with reads of its own.
    """

    model: Model
    buckets: Buckets
    lanes: int
    check: Callable[[Prompt, str, BlendConfig | str | None], TokenizedPrompt]
    prefill: Callable[..., PrefillResult]


@contextmanager
def sharing_reads(
    engine: Prefills,
    prefiller: Prefiller,
    planner_for: Callable[[BlendConfig | str | None], Planner],
    store: Opens,
    *,
    prompts: Sequence[Prompt],
    mode: str,
    blend: BlendConfig | str | None,
) -> Iterator[BatchOfPrompts]:
    """Yields what answers these prompts as the engine does, but reads a chunk that several of them have once.

    Raises:
        CacheBlendError: a prompt, the mode or the blend is invalid.
    """
    placed = [prefiller.place(engine.check(prompt, mode, blend), mode) for prompt in prompts]
    with SharedReads(store, Counter(chunk.key for chunks in placed for chunk in chunks)) as reads:

        def prefill(
            prompt: Prompt | TokenizedPrompt,
            mode: str,
            *,
            blend: BlendConfig | str | None,
            group: int | None = None,
            **_: object,
        ) -> PrefillResult:  # all prompts are this call's: it waits for all of them, in whatever order
            return prefiller.prefill(prefiller.tokenize(prompt), mode, planner_for(blend), reads=reads, group=group)

        yield BatchOfPrompts(engine.model, engine.buckets, engine.lanes, engine.check, prefill)


def generate_all(
    batch: BatchOfPrompts,
    prompts: Sequence[Prompt],
    mode: str,
    blend: BlendConfig | str | None,
    max_new_tokens: int,
    sampling: Sampling | None,
    stop_token_ids: Collection[int] | None,
) -> list[Generation]:
    """Answers prompts together; see `Engine.generate_batch`."""
    if not prompts:
        return []
    longest = max(batch.check(prompt, mode, blend).token_ids.size for prompt in prompts)
    most = batch.model.config.max_positions
    room = min(batch.buckets.length(min(longest + max(max_new_tokens, 1) - 1, most)), most)
    groups = len(batch.model.groups)
    slots = groups * -(-min(len(prompts), MOST_SLOTS) // groups)  # as many for each
    with Scheduler(batch, slots=slots, max_tokens=room, waiting=len(prompts), pausing=False) as scheduler:
        submit = partial(scheduler.submit, mode=mode, blend=blend, max_new_tokens=max_new_tokens)
        answers = [submit(prompt, sampling=sampling, stop_token_ids=stop_token_ids) for prompt in prompts]
        return [answer.result() for answer in answers]
