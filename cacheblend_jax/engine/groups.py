"""The groups of devices that prefill: on a mesh with `data`, several, each with a prompt of its own; else one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.weights_digest import SameLeaves
from cacheblend_jax.runtime.programs import Prepared
from cacheblend_jax.store import ChunkEntry, Store

Task = TypeVar("Task")
Result = TypeVar("Result")


class Groups:
    """Shares prefills out among groups of devices, each of which runs one at a time.

    Args:
        model: the model on all of them.
        executors_of: makes the executors of a group, given its model.

    Attributes:
        models: the model on each group, in the order of the slots that they decode.
        executors: of each.
    """

    def __init__(self, model: Model, executors_of: Callable[[Model], Executors]) -> None:
        self._model, self.models = model, model.groups
        self._follow_whole()
        self.executors = tuple(executors_of(group) for group in self.models)
        # Reentrant: the oracle's full prefill is part of a prefill.
        self._turns = [threading.RLock() for _ in self.executors]
        self._users = [0] * len(self.executors)
        self._choosing = threading.Lock()

    @property
    def first(self) -> Executors:
        """The first group's executors, which differ from the others' in nothing but their devices."""
        return self.executors[0]

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far for prefills, and for what follows them on one group."""
        return sum(group.runner.count for group in self.models)

    @contextmanager
    def turn(self, number: int | None = None) -> Iterator[int]:
        """Waits for a group to be free, and keeps it: the one of that number, or the least busy. Yields its number.

        Raises:
            CacheBlendError: there is no group of that number.
        """
        if number is not None and not is_whole_number(number, least=0, below=len(self.executors)):
            raise CacheBlendError(f"group must be None or a whole number in [0, {len(self.executors)}), got {number!r}")
        with self._using(number) as chosen, self._turns[chosen]:
            yield chosen

    @contextmanager
    def _using(self, number: int | None = None) -> Iterator[int]:
        with self._choosing:
            chosen = self._users.index(min(self._users)) if number is None else number
            self._users[chosen] += 1
            self._follow_changes()
        try:
            yield chosen
        finally:
            with self._choosing:
                self._users[chosen] -= 1

    def _follow_changes(self) -> None:
        """Has the groups' parameters be the whole model's where some of these were replaced; with `_choosing` held."""
        if len(self.models) > 1 and not self._params.as_in(self._model.params):
            self._follow_whole()

    def _follow_whole(self) -> None:
        self._params = SameLeaves(self._model.params)
        for group in self.models:
            group.follow_whole()

    def standalone(self, chunk: PlacedChunk) -> ChunkEntry:
        """Computes a chunk's KV after its context alone, beside prefills, on the group that is the least busy."""
        with self._using() as number:
            return self.executors[number].standalone(chunk)

    def model_of(self, cache: Any) -> Model:
        """Returns the model on the devices that hold a cache."""
        with self._choosing:
            self._follow_changes()
        devices = cache.k.sharding.device_set
        return next((group for group in self.models if group.placement.device_set == devices), self._model)

    def each(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Returns what `work` returns of each task, as many at a time as there are groups."""
        if min(len(tasks), len(self.executors)) <= 1:
            return [work(task) for task in tasks]
        with ThreadPoolExecutor(len(self.executors), thread_name_prefix="cacheblend-group") as threads:
            return list(threads.map(work, tasks))

    def agree_on_kv_dtype(self, store: Store) -> None:
        """See `Executors.agree_on_kv_dtype`."""
        for executors in self.executors:
            executors.agree_on_kv_dtype(store)

    def preparation(
        self, plan: Plan, chunks: Sequence[PlacedChunk], *, pausing: bool = False
    ) -> Callable[[], Prepared]:
        """See `Executors.preparation`: whichever group is free then runs the plan."""
        of_groups = [executors.preparation(plan, chunks, pausing=pausing) for executors in self.executors]

        def prepare() -> Prepared:
            prepared = self.each(lambda prepare: prepare(), of_groups)
            return replace(prepared[0], compile_s=max(each.compile_s for each in prepared))

        return prepare

    def close(self) -> None:
        """Ends the executors' threads, after the prefills that are running."""
        for turn, executors in zip(self._turns, self.executors, strict=True):
            with turn:
                executors.close()
