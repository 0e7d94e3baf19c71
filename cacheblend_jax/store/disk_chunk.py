"""A stored entry that is read from disk, layer by layer or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry, check_layer
from cacheblend_jax.store.pack import EntryReader, UnreadableError
from cacheblend_jax.store.pins import Pin


class DiskChunk:
    """A `StoredChunk` on disk.

    Args:
        uses: how often the entry was seen before.
        pin: what keeps its pack from being evicted.
        on_damage, on_failure: told what is wrong: with the entry's bytes, or with reading them now.
    """

    tier = "disk"

    def __init__(
        self,
        reader: EntryReader,
        uses: int,
        pin: Pin | None,
        on_damage: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._reader, self.uses, self._pin = reader, uses, pin
        self._on_damage, self._on_failure = on_damage, on_failure
        self.num_layers, self.num_tokens = reader.record.shape[:2]
        self.num_bytes = reader.record.num_bytes

    def read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `StoredChunk`."""
        check_layer(layer, self.num_layers)
        with self._damage_noted():
            return self._reader.read_layer(layer)
        raise AssertionError("unreachable")

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        with self._damage_noted():
            return self._reader.read()
        raise AssertionError("unreachable")

    @contextmanager
    def _damage_noted(self) -> Iterator[None]:
        try:
            yield
        except DamagedEntryError as error:
            self._on_damage(str(error))
            raise
        except UnreadableError as error:
            self._on_failure(str(error))
            raise DamagedEntryError(f"entry {self._reader.record.key} cannot be read: {error}") from error

    def close(self) -> None:
        """See `StoredChunk`."""
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.close()

    def __enter__(self) -> DiskChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
