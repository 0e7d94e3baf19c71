"""Loading on a thread: what needs a model's shapes, tokenizer or fingerprint alone need not wait for its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cacheblend_jax.model.mapped_weights import mapped_params, write_params
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.params import Params, suits_by_layer
from cacheblend_jax.model.transformer import abstract_params
from cacheblend_jax.model.weights import OpenedModel, Progress, load_params, open_model
from cacheblend_jax.runtime.programs import shapes_of
from cacheblend_jax.runtime.turns import short_turns
from pallas_kernels.dispatch import current_target


class _Loaded(NamedTuple):
    params: Params
    is_mapped: bool = False


@dataclass(frozen=True, eq=False)
class LoadingModel:
    """A model whose weights are being read.

    Attributes:
        outline: the model with shapes in its weights' place: programs can be compiled for it, and none can run. Its
            tokenizer and its fingerprint are the model's.
    """

    outline: Model
    _opened: OpenedModel
    _weights: Future[_Loaded]

    def model(self) -> Model:
        """Waits for the weights; returns the model, run by the programs that were compiled for `outline`.

        Raises:
            CheckpointError: the weights can't be loaded.
        """
        model = self._opened.model(self._weights.result().params, self.outline.tokenizer)
        model.follow(self.outline)
        return model


@contextmanager
def loading_model(
    name_or_path: str | Path, *, dtype: str | None = None, progress: Progress | None = None
) -> Iterator[LoadingModel]:
    """As `load_model`, on the default device, but yields while the weights are read on a thread.

    Where the body ends before they are, the rest is not read. Where it has what it came for, what was dequantised is
    kept for later processes (`user_cache.keep`) when the body ends.

    Args:
        progress: called on that thread with the bytes loaded so far and their total.

    Raises:
        CheckpointError: something other than the weights is missing, unsupported or misshapen.
    """
    opened = open_model(name_or_path, dtype=dtype)
    abandoned = threading.Event()

    def advance(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        if progress is not None:
            progress(done, total)

    def load() -> _Loaded:
        with short_turns():  # the body imports and traces: without them, reading would mostly wait for it
            if (mapped := mapped_params(opened)) is not None:
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(mapped))
                advance(size, size)
                return _Loaded(mapped, is_mapped=True)
            return _Loaded(load_params(opened.checkpoint, opened.config, progress=advance))

    with ThreadPoolExecutor(1, thread_name_prefix="cacheblend-load") as thread:
        try:
            weights = thread.submit(load)
            tokenizer = opened.checkpoint.tokenizer()
            yield LoadingModel(opened.model(_weight_shapes(opened), tokenizer), opened, weights)
            if weights.done() and weights.exception() is None and not weights.result().is_mapped:
                write_params(opened, weights.result().params)
        finally:
            abandoned.set()


class _AbandonedError(Exception):
    """Ends the reading of weights that nobody waits for any more."""


def _weight_shapes(opened: OpenedModel) -> Params:
    by_layer = suits_by_layer(current_target().platform)
    default_device = jax.device_put(np.zeros((), np.float32)).sharding
    return shapes_of(abstract_params(opened.config, by_layer=by_layer), default_device)
