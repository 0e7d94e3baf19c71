"""A handle on an entry on disk, which reports how its reads went."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TypeVar

import numpy as np

from cacheblend_jax.errors import DamagedEntryError
from cacheblend_jax.store.entry import ChunkEntry, DeviceEntry
from cacheblend_jax.store.entry_reader import EntryReader, UnreadableError
from cacheblend_jax.store.head_groups import check_heads
from cacheblend_jax.store.open_packs import HeldPack
from cacheblend_jax.store.read_health import ReadHealth
from cacheblend_jax.store.stored_chunk import StoredRows, check_layer

Result = TypeVar("Result")


class DiskChunk:
    """A `StoredChunk` on disk.

    Args:
        uses: how often the entry had been used before.
        pack: keeps its pack from being evicted; `None` where nothing does.
        health: is told how reads went; of a handle's failures, only of the first.
        on_damage: called with what is wrong with the entry's bytes.
    """

    tier = "disk"
    device_entry: DeviceEntry | None = None
    host_entry: ChunkEntry | None = None

    def __init__(
        self,
        reader: EntryReader,
        uses: int,
        pack: HeldPack | None,
        health: ReadHealth,
        on_damage: Callable[[str], None],
    ) -> None:
        self._reader, self.uses, self._pack = reader, uses, pack
        self._health, self._on_damage = health, on_damage
        self._first_failure = threading.Lock()  # held from then on
        self.shape: tuple[int, ...] = reader.record.shape
        self.dtype, self.kv_dtype = np.dtype(reader.record.dtype), reader.record.kv_dtype or None
        self.has_k_offset = "k_offset" in reader.record.arrays()
        self.num_layers, self.num_tokens = self.shape[:2]
        self.num_bytes = reader.record.num_bytes

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        check_layer(layer, self.num_layers)
        if heads is not None:
            check_heads(heads, self.shape[2])
        return self._reported(lambda: self._reader.read_layer(layer, heads))

    def read(self) -> ChunkEntry:
        """Returns the whole entry; errors as `read_layer`."""
        return self._reported(self._reader.read)

    def _reported(self, read: Callable[[], Result]) -> Result:
        """Returns what `read` returns; reports what it raises, and raises it as damage.

        Raises:
            DamagedEntryError: the entry is damaged, cannot be read, or was evicted while it waited to be read.
        """
        key = self._reader.record.key
        try:
            with nullcontext() if self._pack is None else self._pack.reading():
                result = read()
        except DamagedEntryError as error:
            self._on_damage(str(error))
            raise
        except FileNotFoundError as error:  # raised by `reading` alone: a reader takes missing files for damage
            raise DamagedEntryError(f"entry {key} was evicted before it was read") from error
        except (UnreadableError, OSError) as error:
            if self._first_failure.acquire(blocking=False):
                self._health.failed(f"an entry cannot be read: {error}")
            raise DamagedEntryError(f"entry {key} cannot be read: {error}") from error
        self._health.succeeded()
        return result

    def keep(self, until: ExitStack) -> bool:
        """Has `until` keep the pack from being evicted and close this handle; returns whether anything can keep it."""
        until.enter_context(self)
        if self._pack is None:
            return False
        until.enter_context(self._pack.reading())
        return True

    def close(self) -> None:
        """See `StoredChunk`."""
        if self._pack is not None:
            self._pack.close()

    def __enter__(self) -> DiskChunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole(chunk: DiskChunk) -> tuple[ChunkEntry, int] | None:
    """Reads an entry and closes it; returns how often it has been used, too. `None` where it cannot be read."""
    with chunk:
        try:
            return chunk.read(), chunk.uses
        except DamagedEntryError:
            return None
