"""What prefills run on: groups of devices, several on a mesh with `data`, and lanes, each with a prompt of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

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


class Lane(NamedTuple):
    """Runs one prefill at a time, by buffers and threads of its own.

    Attributes:
        group: the number of the group of devices that it runs on.
        model: the model on them.
    """

    group: int
    model: Model
    executors: Executors


class Groups:
    """Shares prefills out among groups of devices, and the lanes of each.

    Args:
        model: the model on all of them.
        executors_of: makes the executors of a lane, given the model on its group, and those of the group's first lane.

    Attributes:
        models: the model on each group, in the order of the slots that they decode.
        lanes_each: how many prefills a group runs at a time.
    """

    def __init__(self, model: Model, executors_of: Callable[[Model, Executors | None], Executors]) -> None:
        self._model, self.models, self.lanes_each = model, model.groups, num_lanes(model)
        self._follow_whole()
        self._lanes: list[Lane] = []
        for number, group in enumerate(self.models):
            first = executors_of(group, None)
            lanes = [first, *(executors_of(group, first) for _ in range(1, self.lanes_each))]
            self._lanes += [Lane(number, group, executors) for executors in lanes]
        self._users = [0] * len(self._lanes)
        self._taken: set[int] = set()
        self._changed = threading.Condition()  # guards both

    @property
    def executors(self) -> list[Executors]:
        """One lane's of each group: what they compile, the group's other lanes run."""
        return [lane.executors for lane in self._lanes[:: self.lanes_each]]

    @property
    def first(self) -> Executors:
        """The first group's executors, which differ from the others' in nothing but their devices."""
        return self._lanes[0].executors

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far for prefills, and for what follows them on one group."""
        return sum(group.runner.count for group in self.models)

    @contextmanager
    def turn(self, group: int | None = None) -> Iterator[Lane]:
        """Waits for a lane to be free, and keeps it: the least busy one, of the group of that number if there is one.

        Raises:
            CacheBlendError: there is no group of that number.
        """
        if group is not None and not is_whole_number(group, least=0, below=len(self.models)):
            raise CacheBlendError(f"group must be None or a whole number in [0, {len(self.models)}), got {group!r}")
        numbers = [number for number, lane in enumerate(self._lanes) if group in (None, lane.group)]
        with self._taking(numbers) as number, self._using([number]):
            yield self._lanes[number]

    @contextmanager
    def _taking(self, numbers: Sequence[int]) -> Iterator[int]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken.issuperset(numbers))
            taken = self._least_busy([number for number in numbers if number not in self._taken])
            self._taken.add(taken)
        try:
            yield taken
        finally:
            with self._changed:
                self._taken.remove(taken)
                self._changed.notify_all()

    @contextmanager
    def _using(self, numbers: Sequence[int]) -> Iterator[int]:
        with self._changed:
            used = self._least_busy(numbers)
            self._users[used] += 1
            self._follow_changes()
        try:
            yield used
        finally:
            with self._changed:
                self._users[used] -= 1

    def _least_busy(self, numbers: Sequence[int]) -> int:
        return min(numbers, key=self._users.__getitem__)

    def _follow_changes(self) -> None:
        """Has the groups' parameters be the whole model's where some of these were replaced; with `_changed` held."""
        if len(self.models) > 1 and not self._params.as_in(self._model.params):
            self._follow_whole()

    def _follow_whole(self) -> None:
        self._params = SameLeaves(self._model.params)
        for group in self.models:
            group.follow_whole()

    def standalone(self, chunk: PlacedChunk) -> ChunkEntry:
        """Computes a chunk's KV after its context alone, beside prefills, on the group that is the least busy."""
        with self._using(range(len(self._lanes))) as number:
            return self._lanes[number].executors.standalone(chunk)

    def model_of(self, cache: Any) -> Model:
        """Returns the model on the devices that hold a cache."""
        with self._changed:
            self._follow_changes()
        devices = cache.k.sharding.device_set
        return next((group for group in self.models if group.placement.device_set == devices), self._model)

    def each(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Returns what `work` returns of each task, as many at a time as there are lanes."""
        if min(len(tasks), len(self._lanes)) <= 1:
            return [work(task) for task in tasks]
        with ThreadPoolExecutor(len(self._lanes), thread_name_prefix="cacheblend-lane") as threads:
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
        for number, lane in enumerate(self._lanes):
            with self._taking([number]):
                lane.executors.close()


def num_lanes(model: Model) -> int:
    """Returns how many prefills each group of a model's devices runs at a time: two on a CPU with cores for them.

    A CPU's cores wait for each other while they share one prefill: two at a time take 0.7 times as long as in turn. An
    accelerator runs one program after another.
    """
    devices: list[Any] = list(model.placement.device_set)
    return 2 if [device.platform for device in devices] == ["cpu"] and num_cores() > 1 else 1


def num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
