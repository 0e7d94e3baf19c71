"""How a pack gets into the directory: room is made, files are written aside and renamed, then the index names them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from etils import epath

from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.eviction import make_room
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.object_path import os_errors
from cacheblend_jax.store.pack import size_of, write_pack
from cacheblend_jax.store.pins import make_and_hold
from cacheblend_jax.store.places import Places
from cacheblend_jax.store.space import make_space

MAX_PACK_BYTES = 2**28  # of the entries that share a pack
PACK_OVERHEAD, ARRAY_OVERHEAD = 2**13, 2**10  # bytes reserved for a pack's files beside the arrays


def grouped(entries: Sequence[QueuedEntry], capacity: int) -> list[list[QueuedEntry]]:
    """Divides entries, in order, into those that share a pack: up to 256 MiB, or an eighth of the disk's capacity."""
    most = min(MAX_PACK_BYTES, max(capacity // 8, 1))
    groups: list[list[QueuedEntry]] = []
    size = 0
    for queued in entries:
        size += queued.entry.num_bytes
        if not groups or size > most:
            groups.append([])
            size = queued.entry.num_bytes
        groups[-1].append(queued)
    return groups


def bytes_on_disk(entries: Sequence[QueuedEntry]) -> int:
    """Returns the most bytes that a pack of these entries takes."""
    arrays = [array for queued in entries for array in queued.entry.arrays().values()]
    return PACK_OVERHEAD + sum(ARRAY_OVERHEAD + array.nbytes for array in arrays)


def add_pack(
    places: Places, index: Index, log: DiskLog, capacity: int, entries: Sequence[QueuedEntry], salt: str
) -> bool:
    """Writes entries as a pack and enters it in the index; returns false where it finds no room, which is counted.

    The index names a pack only once it is complete, so that a crash at any instant loses at most the pack being
    written.

    Args:
        capacity: bytes of all packs together.
        salt: of the store, as `salt_hash` gives it.

    Raises:
        OSError, ValueError, RuntimeError, BusyError, sqlite3.Error: the pack could not be written; nothing is left of
            it.
    """
    pack, size = uuid.uuid4().hex, bytes_on_disk(entries)
    with _place_to_write(places, index, pack) as temporary:
        index.reserve(pack, size, salt)
        try:
            if not make_room(places, index, log, capacity):
                log.count("rejected", len(entries))
                return False
            make_space(places, index, log, size)  # rather than let Orbax find out half-way that there is none
            with nullcontext() if places.local else os_errors(temporary):
                records = write_pack(temporary, entries, salt)
            size = size_of(temporary)
            if places.local:
                os.rename(temporary, places.pack(pack))
            uses = {queued.key: queued.uses for queued in entries}
            log.count("written", index.add(pack, size, records, uses=uses))
        finally:
            index.forget_pack(pack, "writing")  # no-op once the pack is ready
    return True


@contextmanager
def _place_to_write(places: Places, index: Index, pack: str) -> Iterator[epath.Path]:
    """Yields where to write a pack: a place held, so that no process takes it for a leftover, and then removed."""
    if not places.local:
        try:
            yield places.pack(pack)
        except BaseException:
            if pack not in index.packs("ready"):
                with suppress(OSError):  # of a killed writer, too, objects are left
                    places.pack(pack).rmtree(missing_ok=True)
            raise
        return
    outer = places.writing / pack
    try:
        pin = make_and_hold(outer)
        with pin:
            yield outer / "pack"
            shutil.rmtree(outer, ignore_errors=True)
    except BaseException:
        shutil.rmtree(outer, ignore_errors=True)
        if pack not in index.packs("ready"):
            shutil.rmtree(places.pack(pack), ignore_errors=True)
        raise
