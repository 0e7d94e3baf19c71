"""A handle on an entry on disk, which reports what is wrong with it to the tier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.entry_reader import EntryReader, UnreadableError
from cacheblend_jax.store.pins import Pin
from cacheblend_jax.store.stored_chunk import Rows, check_layer

Result = TypeVar("Result")


class DiskChunk:
    """A `StoredChunk` on disk.

    Args:
        uses: how often the entry had been used before.
        pin: keeps its pack from being evicted.
        on_damage, on_failure: called with what is wrong with the entry's bytes, or with reading them now.
    """

    tier = "disk"
    device_entry: DeviceEntry | None = None

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

    def read_layer(self, layer: int) -> tuple[Rows, Rows]:
        """See `StoredChunk`."""
        check_layer(layer, self.num_layers)
        return self._reported(lambda: self._reader.read_layer(layer))

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        return self._reported(self._reader.read)

    def _reported(self, read: Callable[[], Result]) -> Result:
        """Returns what `read` returns; reports what it raises, and raises it as damage."""
        try:
            return read()
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
