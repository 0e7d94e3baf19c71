"""Looking after a store's directory: what is in it, what is damaged, and what may be removed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from cacheblend_jax.errors import CacheBlendError, DamagedEntryError
from cacheblend_jax.store import quarantine, recovery
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.entry_reader import EntryReader, UnreadableError
from cacheblend_jax.store.eviction import make_room, remove_pack, sweep
from cacheblend_jax.store.index import Listed
from cacheblend_jax.store.index_file import INDEX_ERRORS, is_broken
from cacheblend_jax.store.pack import file_problems, read_contents
from cacheblend_jax.store.pins import BusyError, Pin
from cacheblend_jax.store.places import Places
from cacheblend_jax.store.record import (
    DamagedRecordError,
    EntryRecord,
    OtherVersionError,
    content_of,
    load_record,
)


class Problem(NamedTuple):
    """What is wrong with an entry, by its storage name; or with a pack, where the name is empty.

    `is_damage`: it is not merely something that this release, or this process, cannot read.
    """

    name: str
    text: str
    is_damage: bool = True


def list_entries(disk: DiskTier, *, all_salts: bool = False) -> list[dict[str, Any]]:
    """Describes every entry, the least recently used first; `problem` says why an entry cannot be used.

    Args:
        all_salts: list the entries of all salts, not only those of the disk's.
    """
    return [_described(row) for row in disk.mended(lambda: _rows(disk, all_salts))]


def totals(disk: DiskTier) -> tuple[int, int]:
    """Returns the bytes of all packs, and the number of entries, of all salts."""
    return disk.mended(lambda: disk.index.totals())


def _rows(disk: DiskTier, all_salts: bool) -> list[Listed]:
    return disk.index.listed(salt=None if all_salts else disk.salt)


def verify(disk: DiskTier, *, repair: bool = False) -> dict[str, Any]:
    """Reads every file and every layer, of all salts, and says what is damaged.

    Args:
        repair: quarantine damaged entries, enter packs that the index does not know, and remove packs without entries.
            What is of another format version stays, as a problem: `prune` removes it. So does what cannot be read now.

    Returns:
        Counts of the `entries` and `packs` read; and `problems`, each `{pack, name, problem}`, where `name` is empty if
        the problem concerns the whole pack.
    """
    problems = _index_problems(disk)
    if problems and not (repair and disk.replace_broken_index()):
        return {"packs": 0, "entries": 0, "problems": problems}
    report = disk.mended(lambda: _verified_packs(disk, repair))
    return report | {"problems": problems + report["problems"]}


def _index_problems(disk: DiskTier) -> list[dict[str, str]]:
    try:
        texts = disk.index.problems()
        if not texts:
            disk.index.totals()
    except INDEX_ERRORS as error:
        if not is_broken(error):
            raise CacheBlendError(f"store {str(disk.places.root)!r} cannot be verified now: {error}") from error
        texts = [str(error)]
    return [{"pack": "", "name": "", "problem": f"index: {text}; --repair makes it anew"} for text in texts]


def _verified_packs(disk: DiskTier, repair: bool) -> dict[str, Any]:
    problems: list[dict[str, str]] = []
    packs = disk.index.packs("ready")
    count = 0
    for pack in packs:
        rows = disk.index.listed(pack)
        try:
            with Pin(disk.places.pack(pack)) if disk.places.local else nullcontext():
                found = _pack_problems(disk.places, pack, rows)
        except BusyError:  # being evicted
            continue
        except FileNotFoundError:
            if pack not in disk.index.packs("ready"):
                continue
            found = [Problem(row.name, "its files are gone") for row in rows]
        except OSError as error:
            found = [Problem("", f"it cannot be read now: {error}")]
        count += len(rows)
        problems += [{"pack": pack, "name": each.name, "problem": each.text} for each in found]
        if repair:
            damage = {each.name: each.text for each in reversed(found) if each.name and each.is_damage}
            for name, text in damage.items():
                disk.quarantine(name, pack, text)
    unknown = recovery.unknown_packs(disk.places, disk.index)
    problems += [{"pack": pack, "name": "", "problem": "the index does not know it"} for pack in unknown]
    if repair:
        recovery.adopt_all(disk.places, disk.index, disk.log)
        disk.index.recount()
        sweep(disk.places, disk.index)
    return {"packs": len(packs), "entries": count, "problems": problems}


def prune(
    disk: DiskTier, *, max_bytes: int | None = None, unused_days: float | None = None, quarantined: bool = False
) -> dict[str, int]:
    """Removes entries, of all salts: those of other format versions, those unused for long, then those evicted first.

    Packs of other format versions that the index does not know are removed too.

    Args:
        max_bytes: evict until so many bytes are left.
        unused_days: remove entries that have not been used for so long.
        quarantined: empty the quarantine too.

    Returns:
        Counts: entries, packs of other versions and quarantined packs removed; entries and bytes left.

    Raises:
        CacheBlendError: `unused_days` is negative or not finite; nothing is removed then.
    """
    if unused_days is not None and not 0 <= unused_days < float("inf"):
        raise CacheBlendError(f"unused_days must be at least 0 and finite, got {unused_days!r}")
    _, before = totals(disk)
    packs_removed = disk.changed(lambda: _pruned(disk, max_bytes, unused_days))
    quarantined_removed = quarantine.empty(disk.places) if quarantined else 0
    size, entries = totals(disk)
    return {
        "removed": before - entries,
        "outdated_packs_removed": packs_removed,
        "quarantined_removed": quarantined_removed,
        "entries": entries,
        "bytes": size,
    }


def _pruned(disk: DiskTier, max_bytes: int | None, unused_days: float | None) -> int:
    """Removes entries as `prune` says, and returns how many packs of other versions it removed."""
    places, index = disk.places, disk.index
    outdated = [row.name for row in index.listed() if _is_outdated(load_record, row.record, row.crc, row.name)]
    index.remove(outdated)
    if unused_days is not None:
        limit = (time.time() - unused_days * 86400) * 1000
        index.remove([row.name for row in index.listed() if row.used < limit])
    unknown = recovery.unknown_packs(places, index)
    outdated_packs = [pack for pack in unknown if _is_outdated(read_contents, places.pack(pack))]
    packs_removed = sum(remove_pack(places, index, pack) and not places.pack(pack).exists() for pack in outdated_packs)
    sweep(places, index)
    if max_bytes is not None:
        make_room(places, index, disk.log, max_bytes)
    return packs_removed


def remove(disk: DiskTier, prefixes: list[str], *, all_salts: bool = False) -> int:
    """Removes entries by the first digits of their names, at least eight; returns how many.

    Args:
        all_salts: remove entries of any salt, not only of the disk's.

    Raises:
        CacheBlendError: a prefix is too short, or no entry or several have it; nothing is removed then.
    """
    names = disk.mended(lambda: [row.name for row in _rows(disk, all_salts)])
    chosen = []
    for prefix in prefixes:
        matching = [name for name in names if name.startswith(prefix)]
        if len(prefix) < 8 or len(matching) != 1:
            raise CacheBlendError(
                f"key {prefix!r} names {len(matching)} entries; give the first 8 or more digits of one (see store ls)"
            )
        chosen += matching
    return disk.remove_names(lambda: chosen)


def _described(row: Listed) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": row.name,
        "pack": row.pack,
        "bytes": row.size,
        "uses": row.uses,
        "used": row.used / 1000,
    }
    try:
        record = load_record(row.record, row.crc, row.name)
    except (DamagedRecordError, OtherVersionError) as error:
        return described | {"problem": str(error)}
    return described | {
        "key": record.key,
        "tokens": record.shape[1],
        "shape": list(record.shape),
        "dtype": record.dtype,
        "kv_dtype": record.kv_dtype or None,
        "created": record.created,
        "fingerprint": record.fingerprint,
        "context_tokens": len(record.context_ids),
        "salt": record.salt,
        "model": record.label.model,
        "text": record.label.text,
    }


def _pack_problems(places: Places, pack: str, rows: list[Listed]) -> list[Problem]:
    """Returns what is wrong with a pack and its entries."""
    path = places.pack(pack)
    problems = []
    written: dict[str, EntryRecord] = {}
    try:
        contents = read_contents(path)
        written = {record.name: record for record in contents.records}
        problems += [Problem("", text) for text in file_problems(path, contents)]
    except (OSError, DamagedRecordError, OtherVersionError) as error:
        problems.append(Problem("", str(error)))
    for row in rows:
        try:
            record = load_record(row.record, row.crc, row.name)
            if written and (record.name not in written or content_of(written[record.name]) != content_of(record)):
                problems.append(Problem(row.name, "index and pack contradict each other"))
            EntryReader(path, record).read()
        except (OtherVersionError, UnreadableError) as error:
            problems.append(Problem(row.name, str(error), is_damage=False))
        except (DamagedRecordError, DamagedEntryError) as error:
            problems.append(Problem(row.name, str(error)))
    return problems


def _is_outdated(read: Callable[..., object], *arguments: object) -> bool:
    """Whether what `read` reads is of another format version."""
    try:
        read(*arguments)
    except OtherVersionError:
        return True
    except (DamagedRecordError, OSError):
        pass
    return False
