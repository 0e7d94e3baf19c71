"""Layers of cached KV on their way to the device while other layers compute: what a streamed prefill takes."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax

from cacheblend_jax.engine.device_layers import PlacedLayers
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import HostRows, LayerReads, abandon, batches, layer_of
from cacheblend_jax.engine.prefill_threads import TracedLane, start_lane
from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.quantised_kv import StoredLayer
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import is_slow
from pallas_kernels import QuantisedKV


class LayerStream:
    """Layers of cached KV on their way to the device, in the order in which they are wanted.

    Reader threads fill the host buffers, as many layers ahead as there are buffers. A transfer thread sends layers to
    the device, at most `device_layers` at a time, and hands each to the loop while it may still be on its way: the step
    that reads it waits for it on the device. A third thread waits until that step is done, then drops the layer from
    the device and has its host buffer filled again. The loop itself only waits for layers to be sent.

    On a GPU, a transfer waits for all programs that were dispatched before it (its memory may be theirs until then). So
    `sent_ahead` further layers are sent before one is handed over: their transfers run beside its step. A layer that
    comes from a slow tier is not waited for.

    Args:
        chunks: what to load, and where.
        layers: the layers wanted, in order; a layer may occur more than once, and is not read again where its buffer
            still holds it.
        buffers: K and V on the host, each `[host_layers, keys, kv_heads, head_dim]`, quantised or not.
        device_layers: how many layers of cached KV may be on the device.
        put: puts arrays on the device; they may still be on their way when it returns.
        readers: the pool of reader threads.
        threads: how many copy within host memory at a time.
        sent_ahead: how many layers more are sent before one is handed over; less than `device_layers`.
        kept: the layers that are on the device already, which are not loaded; those that it has room for stay there.

    Attributes:
        waited_s: seconds in which the loop waited for layers to be sent.

    Raises:
        CacheBlendError: a thread cannot be started; nothing is left running.
    """

    def __init__(
        self,
        chunks: Sequence[PlacedChunk],
        layers: Sequence[int],
        buffers: tuple[HostRows, HostRows],
        device_layers: int,
        put: Callable[[Any], Any],
        readers: Executor,
        trace: Trace | None = None,
        *,
        threads: int = 1,
        sent_ahead: int = 0,
        kept: PlacedLayers | None = None,
    ) -> None:
        self.waited_s, self._device_layers = 0.0, device_layers
        self._kept = PlacedLayers() if kept is None else kept
        self._sent_ahead, self._is_slow = sent_ahead, any(is_slow(chunk.tier) for chunk in chunks)
        self._layers, self._buffers = layers, buffers
        # Turns whose layers are loaded, in order; a turn's place among them says which buffer is its.
        self._loaded = [turn for turn, layer in enumerate(layers) if layer not in self._kept.layers]
        self._places = {turn: place for place, turn in enumerate(self._loaded)}
        # No more than there are layers to load: one that comes twice finds itself in the buffer then.
        self._slots = min(len(jax.tree.leaves(buffers)[0]), len({layers[turn] for turn in self._loaded}))
        self._reader = LayerReads(chunks, buffers, readers, trace, threads)
        self._batches = {batch[-1]: batch for batch in self._batches_of(device_layers)}
        self._put, self._trace = put, trace
        self._room = threading.Semaphore(device_layers)
        self._reads: dict[int, list[Future]] = {}  # by turn; those of a batch have one list
        self._arrived: queue.SimpleQueue[StoredLayer | BaseException] = queue.SimpleQueue()
        self._in_use: queue.SimpleQueue[tuple[int, StoredLayer, jax.Array, float] | None] = queue.SimpleQueue()
        self._transfers: TracedLane | None = None
        self._traced: dict[int, threading.Event] = {}  # by turn, once its transfer is
        self._closed = False
        self._current: StoredLayer | None = None
        self._turn = -1
        self._lanes: list[threading.Thread] = []
        try:
            for last in range(self._slots):
                self._read(last)
            if trace is not None:  # by a thread of its own: the link does not rest until their ends have been noticed
                self._transfers = TracedLane(trace, "transfer")
            for lane in (self._transfer, self._release):
                self._lanes.append(start_lane(lane))
        except BaseException:
            self.close()
            raise

    def next(self) -> StoredLayer:
        """Waits for the next layer's K (before RoPE) and V, `[keys, kv_heads, head_dim]`, on the device.

        Raises:
            LostChunkError: a chunk is damaged or its tier failed.
        """
        began = time.perf_counter()
        arrived = self._arrived.get()
        self.waited_s += time.perf_counter() - began
        if isinstance(arrived, BaseException):
            raise arrived
        self._turn += 1
        self._current = arrived
        return arrived

    def bytes_ahead(self, layer_bytes: int) -> int:
        """Returns the bytes of layers that may be on the device at a time, beside the one that a step reads."""
        return (self._device_layers - 1) * layer_bytes

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache: layers come by themselves."""
        return blended

    def used_until(self, result: jax.Array) -> None:
        """Declares that the step which computes `result` reads the layer last taken, and that nothing later does."""
        assert self._current is not None
        self._in_use.put((self._turn, self._current, result, time.perf_counter()))
        self._current = None

    def close(self) -> None:
        """Stops loading, and waits until no thread and no step uses the buffers."""
        self._closed = True
        self._in_use.put(None)
        self._room.release()
        for lane in self._lanes:
            lane.join()
        if self._transfers is not None:
            self._transfers.close()
        abandon([future for reads in self._reads.values() for future in reads])
        unused = [] if self._current is None else [self._current]
        while not self._arrived.empty():
            arrived = self._arrived.get()
            if isinstance(arrived, LayerKV | QuantisedKV):
                unused.append(arrived)
        for kv in unused:
            jax.block_until_ready(kv)  # until then, its host buffer is being read
            if not any(kv is kept for kept in self._kept.layers.values()):
                _delete(kv)

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slot(self, turn: int) -> tuple[HostRows, HostRows]:
        slot = self._places[turn] % self._slots
        return jax.tree.map(lambda buffer: buffer[slot], self._buffers)

    def _batches_of(self, device_layers: int) -> list[range]:
        """Returns the places of loaded turns that are read together.

        Those whose buffers are free from the first on; and later ones, which are read when the last of their buffers
        is free. That must be no later than there is room on the device for the first of them.
        """
        at_first = batches(self._slots, self._reader.most_layers)
        size = max(1, min(max(map(len, at_first), default=1), self._slots - device_layers + 1))
        later = range(self._slots, len(self._loaded))
        return at_first + [later[first : first + size] for first in range(0, len(later), size)]

    def _read(self, last: int) -> None:
        """Begins to read the batch of which this is the last place, if it is one's, but for what is there already."""
        turns = [self._loaded[place] for place in self._batches.get(last, ()) if not self._is_held(place)]
        tasks: list[Future] = []
        self._reads.update(dict.fromkeys(turns, tasks))
        while turns:
            first, slot = self._layers[turns[0]], self._places[turns[0]] % self._slots
            count = 1
            while count < len(turns) and self._follows(turns[count], first + count, slot + count):
                count += 1
            tasks += self._reader.begin(range(first, first + count), slot)
            turns = turns[count:]

    def _follows(self, turn: int, layer: int, slot: int) -> bool:
        return self._layers[turn] == layer and self._places[turn] % self._slots == slot

    def _transfer(self) -> None:
        sent: deque[StoredLayer] = deque()  # and not handed over yet
        try:
            for turn, layer in enumerate(self._layers):
                there = self._kept.layers.get(layer)
                if there is None:
                    if self._is_slow and not self._is_read(turn):
                        self._hand_over(sent, keep=0)
                    self._room.acquire()
                    if self._closed:
                        break
                    if (there := self._kept.layers.get(layer)) is not None:  # since the step that made room
                        self._room.release()
                sent.append(self._send(turn, layer) if there is None else there)
                self._hand_over(sent, keep=self._sent_ahead)
            self._hand_over(sent, keep=0)
        except BaseException as error:
            self._hand_over(sent, keep=0)
            self._arrived.put(error)

    def _is_held(self, place: int) -> bool:
        """Whether the buffer of a loaded turn holds its layer from an earlier one."""
        before = place - self._slots
        return before >= 0 and self._layers[self._loaded[before]] == self._layers[self._loaded[place]]

    def _is_read(self, turn: int) -> bool:
        reads = self._reads.get(turn)
        return self._is_held(self._places[turn]) if reads is None else all(future.done() for future in reads)

    def _hand_over(self, sent: deque[StoredLayer], keep: int) -> None:
        """Hands sent layers to the loop, all but the latest `keep`."""
        while len(sent) > keep:
            self._arrived.put(sent.popleft())

    def _send(self, turn: int, layer: int) -> StoredLayer:
        for future in self._reads.get(turn, ()):  # begun before there was room, if they had to begin
            future.result()
        began = time.perf_counter()
        on_device = layer_of(self._put(self._slot(turn)))
        if self._transfers is not None:
            self._traced[turn] = self._transfers.add(layer, on_device, began)
        return on_device

    def _release(self) -> None:
        free_at = 0.0
        try:
            while (used := self._in_use.get()) is not None:
                turn, kv, result, dispatched = used
                jax.block_until_ready(result)
                if (traced := self._traced.pop(turn, None)) is not None:
                    # A step ends after its layer's transfer in the trace, too; and waiting for an array while another
                    # thread deletes it ends the process.
                    traced.wait()
                began, free_at = max(dispatched, free_at), time.perf_counter()
                if self._trace is not None:
                    layer = self._layers[turn]
                    self._trace.add("compute", f"layer {layer}", layer, began, free_at)
                self._let_go(turn, kv)
        except BaseException as error:
            self._arrived.put(error)

    def _let_go(self, turn: int, kv: StoredLayer) -> None:
        """Drops a layer whose step is done, unless it stays on the device, and has its buffer filled again."""
        layer = self._layers[turn]
        was_kept = self._kept.layers.get(layer) is kv
        if not was_kept and not self._kept.keep(layer, kv):
            _delete(kv)
        again = self._places.get(turn, len(self._loaded)) + self._slots
        if not self._closed:
            self._read(again)
        if not was_kept:
            self._room.release()


def _delete(kv: StoredLayer) -> None:
    for array in jax.tree.leaves(kv):
        array.delete()
