"""What is compiled before the first request: the programs of all prompts within given sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to
from cacheblend_jax.engine.executors import Execution
from cacheblend_jax.engine.generation import decoding_program
from cacheblend_jax.engine.layout import MODES
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.model import Model


@dataclass(frozen=True)
class Sizes:
    """Up to which sizes, see `Engine.warmup`.

    Raises:
        CacheBlendError: one that makes no sense.
    """

    max_tokens: int
    modes: tuple[str, ...]
    prefix_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise CacheBlendError(f"unknown mode {unknown[0]!r}; expected among {', '.join(MODES)}")
        least = {"max_tokens": 1, "prefix_tokens": 0, "suffix_tokens": 1, "chunk_tokens": 0, "max_new_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise CacheBlendError(f"{name} must be a whole number of at least {smallest}, got {value!r}")

    def programs(
        self,
        model: Model,
        planners: Sequence[Planner],
        execution: Execution,
        buckets: Buckets,
        context_tokens: int | None,
    ) -> list[Callable[[], object]]:
        """Returns what compiles them, each some of the programs.

        Raises:
            CacheBlendError: `max_tokens` is beyond the model's maximum.
        """
        most = model.config.max_positions
        if self.max_tokens > most:
            raise CacheBlendError(f"max_tokens must be in [1, {most}], got {self.max_tokens!r}")
        context = self.prefix_tokens if context_tokens is None else min(self.prefix_tokens, context_tokens)
        exact_chunk = self.chunk_tokens if context == self.prefix_tokens else 0
        sizes = (self.max_tokens, self.modes, self.prefix_tokens, self.suffix_tokens, exact_chunk)
        plans = dict.fromkeys(plan for planner in planners for plan in planner.plans_up_to(*sizes))
        work: list[Callable[[], object]] = [partial(execution.warm_up, plan) for plan in plans]
        if self.chunk_tokens:
            alone = {buckets.length(max(self.prefix_tokens, 1))}
            alone |= {*buckets_up_to(buckets.length, min(context + self.chunk_tokens, most))}
            work += [partial(execution.standalone_program, size) for size in sorted(alone)]
        if self.max_new_tokens > 1 and len(model.placement.device_set) == 1:  # a mesh's prefills say how KV is split
            decoded = buckets_up_to(buckets.length, min(self.max_tokens + self.max_new_tokens - 1, most))
            work += [partial(decoding_program, model, size, model.placement) for size in decoded]
        return work
