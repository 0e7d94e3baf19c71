"""Pages of stored KV on their way from host memory to the device, into the cache, while layers compute."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from cacheblend_jax.engine.device_layers import PlacedLayers
from cacheblend_jax.engine.entry_pages import PAGES_TOGETHER, Page, PageKV, place_pages, places_of
from cacheblend_jax.engine.prefill_threads import TracedLane
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.quantised_kv import StoredLayer, stored_layer
from cacheblend_jax.runtime.trace import Trace

_Sent = tuple[tuple[PageKV, ...], jax.Array]  # pages, and `places_of` them


class PageStream:
    """Brings pages to the device in the order in which layers need them; a `LayerSource` of layers in the cache.

    Layers may be taken a second time, after all of them: they are in the cache then, or on the device.

    Before a step is dispatched, the pages are sent that the layer `ahead` of it needs, or, before `first_layer`, those
    that `first_layer` needs. On a GPU a transfer waits for all programs that were dispatched before it, so that it has
    to be sent before the steps which it is to run beside. What is sent may still be on its way: programs that place it
    wait for it on the device. No thread does this: sending is Python's work, as dispatching is, and two threads would
    wait for each other's turns.

    Args:
        pages: in the order of their layers; their entries are page-locked.
        first_layer: the first layer whose stored KV is read whole; those before compute all keys but the exact chunks'.
        layers: the layers' numbers, each an array on the device.
        rows: of a page.
        num_keys: of the cache.
        put: puts rows on the device; they may still be on their way when it returns.
        run: runs a function as a program (`runtime.programs.Runner`).
        ahead: how many layers ahead of a step pages are sent.
        room: how many layers' pages may be on the device beyond the last layer whose step is done; more than `ahead`.
        kept: the layers that stay on the device: they are placed into the cache from there, and have no pages. Others
            that there is room for are copied, to stay there; if there is any, all layers are read whole.

    Attributes:
        waited_s: seconds of sending before the first step, which nothing hides.

    Raises:
        CacheBlendError: a thread that traces cannot be started; nothing is left running.
    """

    def __init__(
        self,
        pages: Sequence[Page],
        first_layer: int,
        layers: Sequence[jax.Array],
        rows: int,
        num_keys: int,
        put: Callable[[Any], Any],
        run: Callable[..., Any],
        trace: Trace | None = None,
        *,
        ahead: int,
        room: int,
        kept: PlacedLayers,
    ) -> None:
        self.waited_s = 0.0
        self._first, self._layers, self._put, self._run = first_layer, layers, put, run
        self._rows, self._num_keys = rows, num_keys
        self._ahead, self._room, self._kept = ahead, room, kept
        self._pages: dict[int, list[Page]] = defaultdict(list)
        for page in pages:
            self._pages[page.layer].append(page)
        self._sent = 0  # the layers below have their pages on the device, or on their way
        self._there: dict[int, list[_Sent]] = {}  # by layer; until its step is known to be done
        self._results: dict[int, jax.Array] = {}  # by the number of the step
        self._stayed = dict(kept.layers)
        self._turn, self._is_sending = -1, False
        self._lanes: dict[str, TracedLane] = {}
        if trace is not None:
            try:
                for name in ("transfer", "compute"):
                    self._lanes[name] = TracedLane(trace, name)
            except BaseException:
                self.close()
                raise

    def next(self) -> StoredLayer | None:
        """Returns the next layer's stored KV if it stays on the device; else `None`: see `placed`."""
        self._turn += 1
        began = time.perf_counter()
        last = self._first if self._turn < self._first else min(self._turn + self._ahead, len(self._layers) - 1)
        while self._sent <= last:
            if self._sent in self._pages:
                self._make_room(self._sent)
                self._send(self._sent)
            self._sent += 1
        if self._turn == 0:
            self.waited_s = time.perf_counter() - began
        if self._is_second:
            self._make_room(self._turn)
        return self._stayed.get(self._layer)

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache with the pages placed that the layer needs."""
        if self._is_second:
            return blended
        layer = self._layer
        for pages, places in self._there.get(layer, ()):
            filled = *pages, *pages[:1] * (PAGES_TOGETHER - len(pages))
            blended = self._run(place_pages, blended, filled, places, donate=("cache",))
        if layer < self._kept.room:
            self._kept.keep(layer, self._run(stored_layer, blended, self._layers[layer]))
        return blended

    def bytes_ahead(self, layer_bytes: int) -> int:
        """Returns the bytes of pages that may be on the device at a time, beside the cache."""
        counts = [sum(len(pages) for layer, pages in self._pages.items() if layer <= self._first)]
        for last in self._pages:
            counts.append(sum(len(self._pages.get(last - i, ())) for i in range(self._room)))
        page = next((page.rows(self._rows) for pages in self._pages.values() for page in pages), ())
        return max(counts) * sum(leaf.nbytes for leaf in jax.tree.leaves(page))

    def used_until(self, result: jax.Array) -> None:
        """Declares that the step which computes `result` reads the layer last taken."""
        if "compute" in self._lanes:
            self._lanes["compute"].add(self._layer, result)
        self._results[self._turn] = result

    def close(self) -> None:
        """Waits until the device reads nothing of the entries any more."""
        for lane in self._lanes.values():
            lane.close()
        with suppress(jax.errors.JaxRuntimeError):  # the step that reads it fails, too, and says so
            jax.block_until_ready(self._there)
            if self._is_sending:  # it was cut short; transfers are in order
                jax.block_until_ready(self._put(np.zeros(1, np.int32)))
        self._there.clear()

    def __enter__(self) -> PageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _layer(self) -> int:
        """The layer last taken."""
        return self._turn % len(self._layers)

    @property
    def _is_second(self) -> bool:
        """Whether it was taken before."""
        return self._turn >= len(self._layers)

    def _make_room(self, turn: int) -> None:
        """Waits until the step `room` before a layer's is done, and lets the pages up to there go."""
        done = turn - self._room
        if done not in self._results:  # what the first step waits for finds room in any case
            return
        jax.block_until_ready(self._results[done])
        for earlier in [each for each in self._results if each <= done]:
            del self._results[earlier]
            self._there.pop(earlier, None)

    def _send(self, layer: int) -> None:
        began, pages, there = time.perf_counter(), self._pages[layer], self._there.setdefault(layer, [])
        for first in range(0, len(pages), PAGES_TOGETHER):
            some = pages[first : first + PAGES_TOGETHER]
            self._is_sending = True
            # Where the rows go, too: the program that places them would wait for it behind the pages of later layers.
            there.append(self._put((tuple(page.rows(self._rows) for page in some), places_of(some, self._num_keys))))
            self._is_sending = False
        if "transfer" in self._lanes:
            self._lanes["transfer"].add(layer, there, began)
