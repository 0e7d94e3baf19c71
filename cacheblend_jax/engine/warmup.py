"""Warm-up: compiles the programs of all prompts within given sizes, or those of one prompt, before they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to
from cacheblend_jax.choices import MODES
from cacheblend_jax.engine.delays import ComputeModel
from cacheblend_jax.engine.generation import warm_up_decoding
from cacheblend_jax.engine.groups import Groups
from cacheblend_jax.engine.layout import ChunkContext, PlacedChunk
from cacheblend_jax.engine.pauses import may_be_long
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.runtime.exit_hook import several_at_a_time
from cacheblend_jax.store import Store


@dataclass(frozen=True)
class Sizes:
    """The sizes that warm-up covers; see `Engine.warmup`.

    Raises:
        CacheBlendError: an unknown mode, or a size that is too small or not a whole number.
    """

    max_tokens: int
    modes: tuple[str, ...]
    prefix_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise CacheBlendError(f"unknown mode {unknown[0]!r}; expected one of {', '.join(MODES)}")
        least = {"max_tokens": 1, "prefix_tokens": 0, "suffix_tokens": 1, "chunk_tokens": 0, "max_new_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not is_whole_number(value, least=smallest):
                raise CacheBlendError(f"{name} must be a whole number of at least {smallest}, got {value!r}")


def warm_up(
    sizes: Sizes,
    planner: Planner,
    groups: Groups,
    context: ChunkContext,
    progress: Callable[[int, int], None] | None,
    pausing: ComputeModel | None = None,
) -> int:
    """Compiles all programs of those sizes, for each group of devices; returns how many; see `Engine.warmup`.

    Args:
        pausing: how long plans take, where what runs the long ones with pauses is to be compiled, too.

    Raises:
        CacheBlendError: `max_tokens` is beyond the model's maximum.
    """
    tasks = _compile_tasks(sizes, planner, groups, context, pausing)
    before = groups.num_compiled
    run_tasks(tasks, progress)
    return groups.num_compiled - before


def _compile_tasks(
    sizes: Sizes, planner: Planner, groups: Groups, context: ChunkContext, pausing: ComputeModel | None
) -> list[Callable[[], object]]:
    """Returns calls that together compile all programs of those sizes; they may run at the same time."""
    most, buckets = planner.config.max_positions, planner.buckets
    if sizes.max_tokens > most:
        raise CacheBlendError(f"max_tokens must be in [1, {most}], got {sizes.max_tokens!r}")
    prefix = np.zeros(sizes.prefix_tokens, np.int32)
    after, shared = context.after(prefix).size, context.shared_with(prefix).size
    exact_chunk = sizes.chunk_tokens if after == shared == sizes.prefix_tokens else 0
    modes = (*sizes.modes, "full")  # for prompts none of whose chunks is stored, or can be read
    limits = (sizes.max_tokens, modes, sizes.prefix_tokens, sizes.suffix_tokens, exact_chunk)
    planners = [replace(planner, blend=blend) for blend in planner.blend.fixed()]
    plans = dict.fromkeys(plan for planner in planners for plan in planner.plans_up_to(*limits))
    tasks: list[Callable[[], object]] = [
        partial(each.warm_up, plan, pausing=pausing is not None and may_be_long(plan, pausing))
        for plan in plans
        for each in groups.executors
    ]
    if sizes.chunk_tokens:
        alone = {(0, buckets.length(max(sizes.prefix_tokens, 1)))}
        alone |= groups.first.alone.sizes(after, sizes.chunk_tokens)
        tasks += _standalone_tasks(groups, alone)
    if sizes.max_new_tokens > 1:
        pairs = _cache_sizes(buckets, sizes.max_tokens, sizes.max_new_tokens, most)
        tasks += [partial(warm_up_decoding, group, *pair) for pair in pairs for group in groups.models]
    return tasks


def _standalone_tasks(groups: Groups, sizes: Collection[tuple[int, int]]) -> list[Callable[[], object]]:
    return [partial(each.alone.warm_up, *size) for size in sorted(sizes) for each in groups.executors]


def _cache_sizes(buckets: Buckets, max_tokens: int, max_new_tokens: int, most: int) -> list[tuple[int, int]]:
    """Returns the sizes of caches after prefills, each with those of the caches that decoding then needs."""
    prefilled = buckets_up_to(buckets.length, max_tokens)
    pairs = []
    for before, size in zip([0, *prefilled], prefilled, strict=False):
        longest = min(min(size, max_tokens) + max_new_tokens - 1, most)
        grown = buckets_up_to(buckets.length, longest)
        pairs += [(size, each) for each in grown if each >= buckets.length(min(before + 2, longest))]
    return pairs


def prompt_tasks(
    tokenized: TokenizedPrompt,
    chunks: Sequence[PlacedChunk],
    placed: dict[str, list[PlacedChunk]],
    max_new_tokens: int,
    precomputed: bool,
    planner: Planner,
    groups: Groups,
    store: Store,
) -> list[Callable[[], object]]:
    """Returns calls that together compile what precomputing a prompt, prefilling it and decoding need, in that order.

    What the store has now is taken to come from its slowest tier.

    Args:
        chunks: those to be precomputed.
        placed: those that each mode looks up.
        precomputed: whether the chunks are to be precomputed; else what the store lacks is computed in the prompt.
    """
    missing = {chunk.key: chunk for chunk in chunks if chunk.key not in store}
    tasks = _standalone_tasks(groups, groups.first.alone.sizes_of(missing.values())) if precomputed else []
    length = tokenized.token_ids.size
    for mode, looked_up in placed.items():
        if not precomputed:
            looked_up = [chunk for chunk in looked_up if chunk.key not in missing]
        if planner.blend.is_auto and mode == "blend":
            continue  # the controller chooses its plan when the request comes
        tokens = Counter({True: 0, False: 0})
        for chunk in looked_up:
            tokens[chunk.exact] += min(chunk.stop, length - 1) - chunk.start  # the last token is always computed
        plan = planner.plan(mode, length, tokens[True], tokens[False])
        tiers = {"host" if chunk.key in missing else store.tiers[-1] for chunk in looked_up}
        tasks += [partial(each.warm_up, plan, tiers) for each in groups.executors]
    if max_new_tokens > 1:
        size = planner.buckets.length(min(length + max_new_tokens - 1, planner.config.max_positions))
        before = planner.buckets.length(length)
        tasks += [partial(warm_up_decoding, group, before, size) for group in groups.models]
    return tasks


def run_tasks(tasks: Sequence[Callable[[], object]], progress: Callable[[int, int], None] | None) -> None:
    """Calls tasks that compile, several at a time; `progress` counts those that are done."""
    with several_at_a_time() as threads:
        futures = [threads.submit(task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(done, len(tasks))
