"""Layers of cached KV on their way to the device while other layers compute: what a streamed prefill takes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax
import numpy as np

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import abandon, read_share, shares, submit_or_run
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.kv_cache import LayerKV
from cacheblend_jax.runtime.trace import Trace


class LayerStream:
    """Layers of cached KV on their way to the device, in the order in which they are wanted.

    Reader threads fill the host buffers, as many layers ahead as there are buffers. A transfer thread sends layers to
    the device, at most `device_layers` at a time, and hands each to the loop as soon as it is on its way: the step that
    reads it waits for it on the device. A third thread waits until that step is done, then drops the layer from the
    device and has its host buffer filled again. The loop itself only waits for layers to be sent.

    Args:
        chunks: what to load, and where.
        layers: the layers wanted, in order; a layer may occur more than once, and is not read again where its buffer
            still holds it.
        buffers: K and V on the host, each `[host_layers, keys, kv_heads, head_dim]`.
        device_layers: how many layers of cached KV may be on the device.
        put: puts arrays on the device; they may still be on their way when it returns.
        readers: the pool of reader threads.
        threads: how many of them copy within host memory at a time.

    Raises:
        CacheBlendError: a thread cannot be started; nothing is left running.
    """

    def __init__(
        self,
        chunks: Sequence[PlacedChunk],
        layers: Sequence[int],
        buffers: tuple[np.ndarray, np.ndarray],
        device_layers: int,
        put: Callable[[Any], Any],
        readers: Executor,
        trace: Trace | None = None,
        *,
        threads: int = 1,
    ) -> None:
        self.waited_s = 0.0
        self._layers, self._buffers = layers, buffers
        self._shares = shares(chunks, threads)
        self._put, self._trace, self._readers = put, trace, readers
        self._room = threading.Semaphore(device_layers)
        self._reads: dict[int, list[Future]] = {}
        self._arrived: queue.SimpleQueue[LayerKV | BaseException] = queue.SimpleQueue()
        self._in_use: queue.SimpleQueue[tuple[int, LayerKV, jax.Array, float] | None] = queue.SimpleQueue()
        self._closed = False
        self._current: LayerKV | None = None
        self._turn = -1
        self._lanes: list[threading.Thread] = []
        try:
            for turn in range(min(len(buffers[0]), len(layers))):
                self._read(turn)
            for lane in (self._transfer, self._release):
                thread = threading.Thread(target=lane, name="cacheblend-lane")
                thread.start()
                self._lanes.append(thread)
        except BaseException as error:
            self.close()
            if not isinstance(error, RuntimeError):
                raise
            raise CacheBlendError(
                f"a request cannot load its stored KV: {error}; let the process have more threads (ulimit -u), or use "
                "executor='resident'"
            ) from error

    def next(self) -> LayerKV:
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
        abandon([future for reads in self._reads.values() for future in reads])
        unused = [] if self._current is None else [self._current]
        while not self._arrived.empty():
            arrived = self._arrived.get()
            if isinstance(arrived, LayerKV):
                unused.append(arrived)
        for kv in unused:
            jax.block_until_ready(kv)  # until then, its host buffer is being read
            _delete(kv)

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slot(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        slot = turn % len(self._buffers[0])
        return self._buffers[0][slot], self._buffers[1][slot]

    def _read(self, turn: int) -> None:
        (k, v), layer = self._slot(turn), self._layers[turn]
        reads = self._reads[turn] = list[Future]()
        for share in self._shares:
            reads.append(submit_or_run(self._readers, read_share, share, layer, k, v, self._trace))

    def _transfer(self) -> None:
        try:
            for turn, layer in enumerate(self._layers):
                self._room.acquire()
                if self._closed:
                    return
                for future in self._reads.get(turn, ()):  # none: the buffer holds the layer from an earlier turn
                    future.result()
                began = time.perf_counter()
                on_device = LayerKV(*self._put(self._slot(turn)))
                if self._trace is not None:  # else the link need not rest until this thread has noticed its end
                    jax.block_until_ready(on_device)
                    self._trace.add("transfer", f"layer {layer}", layer, began, time.perf_counter())
                self._arrived.put(on_device)
        except BaseException as error:
            self._arrived.put(error)

    def _release(self) -> None:
        free_at = 0.0
        try:
            while (used := self._in_use.get()) is not None:
                turn, kv, result, dispatched = used
                jax.block_until_ready(result)
                began, free_at = max(dispatched, free_at), time.perf_counter()
                if self._trace is not None:
                    layer = self._layers[turn]
                    self._trace.add("compute", f"layer {layer}", layer, began, free_at)
                _delete(kv)
                again = turn + len(self._buffers[0])
                if again < len(self._layers) and self._layers[again] != self._layers[turn] and not self._closed:
                    self._read(again)
                self._room.release()
        except BaseException as error:
            self._arrived.put(error)


def _delete(kv: LayerKV) -> None:
    for array in jax.tree.leaves(kv):
        array.delete()
