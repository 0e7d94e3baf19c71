"""Entries that several prefills share: each is opened once, and its layers are read from a slow tier once."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, runtime_checkable

from cacheblend_jax.store import DeviceEntry, StoredChunk, is_slow
from cacheblend_jax.store.stored_chunk import StoredRows


@runtime_checkable
class Opens(Protocol):
    """The part of a `Store` that a prefill reads from."""

    def open(self, key: str) -> StoredChunk | None:
        """Returns a handle on an entry; `None` where there is none."""


class SharedReads:
    """Opens entries for prefills that follow each other, and keeps them open until it is closed.

    Layers of a slow tier stay in host memory, so that the next prefill with the same chunk finds them there.
    """

    def __init__(self, store: Opens) -> None:
        self._store = store
        self._handles = ExitStack()
        self._opened: dict[str, _KeptChunk] = {}

    def open(self, key: str) -> StoredChunk | None:
        """See `Store.open`; an entry that could not be read is opened anew."""
        kept = self._opened.get(key)
        if kept is None or kept.has_failed:
            stored = self._store.open(key)
            if stored is None:
                return None
            kept = self._opened[key] = _KeptChunk(self._handles.enter_context(stored))
        return kept

    def __enter__(self) -> SharedReads:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._handles.close()


class _KeptChunk:
    """A `StoredChunk` that keeps the layers it has read from a slow tier; closing is left to who opened it."""

    def __init__(self, stored: StoredChunk) -> None:
        self._stored = stored
        self._layers: dict[int, tuple[StoredRows, StoredRows]] = {}
        self.shape, self.dtype, self.kv_dtype = stored.shape, stored.dtype, stored.kv_dtype
        self.has_k_offset = stored.has_k_offset
        self.num_layers, self.num_tokens, self.num_bytes = stored.num_layers, stored.num_tokens, stored.num_bytes
        self.device_entry: DeviceEntry | None = stored.device_entry
        self.tier = stored.tier  # host memory, once all layers are there
        self.has_failed = False

    def read_layer(self, layer: int) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        if layer in self._layers:
            return self._layers[layer]
        try:
            read = self._stored.read_layer(layer)
        except Exception:
            self.has_failed = True
            raise
        if is_slow(self._stored.tier):
            self._layers[layer] = read
            if len(self._layers) == self.num_layers:
                self.tier = "host"
        return read

    def close(self) -> None:
        """Does nothing: later prefills read it, too."""

    def __enter__(self) -> _KeptChunk:
        return self

    def __exit__(self, *_: object) -> None:
        pass
