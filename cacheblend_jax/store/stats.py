"""What a store counts: each tier by itself, and the store as a whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """Counts of one tier since the store was made, and what it holds now.

    Attributes:
        hits: entries that `get` and `open` served from here.
        entries, bytes: held now; on disk, `bytes` counts every file of the packs.
        evicted: entries that made room for others.
        rejected: entries larger than the tier, or that found no room among entries in use.
    """

    hits: int = 0
    entries: int = 0
    bytes: int = 0
    evicted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class StoreStats:
    """A snapshot of a store's counts since it was made.

    Attributes:
        host, device, disk: the tiers. Entries still queued for the disk count as hits of the host's.
        misses: calls of `get` and `open` that found no entry.
        stored: entries put and kept.
        written: entries written to disk.
        dropped: entries not written because the queue was full, or because no thread could be started.
        unwritable: entries not written because the directory can only be read.
        damaged: entries and indexes whose bytes were not those written; they are quarantined.
        outdated: entries of another format version; they count as missing.
        write_errors, read_errors: failures of the file system; the entries stay in memory, or are misses.
        skipped: look-ups that left the disk out, because reading from it had failed repeatedly.
        queued_bytes: of the entries that wait to be written now.
    """

    host: TierStats = TierStats()
    device: TierStats = TierStats()
    disk: TierStats = TierStats()
    misses: int = 0
    stored: int = 0
    written: int = 0
    dropped: int = 0
    unwritable: int = 0
    damaged: int = 0
    outdated: int = 0
    write_errors: int = 0
    read_errors: int = 0
    skipped: int = 0
    queued_bytes: int = 0

    @property
    def hits(self) -> int:
        """Calls of `get` and `open` that found an entry, in any tier."""
        return self.host.hits + self.device.hits + self.disk.hits


@dataclass(frozen=True)
class DiskStats:
    """What the disk tier knows of itself; see `TierStats` and `StoreStats`."""

    entries: int = 0
    bytes: int = 0
    evicted: int = 0
    rejected: int = 0
    written: int = 0
    unwritable: int = 0
    damaged: int = 0
    outdated: int = 0
    write_errors: int = 0
    read_errors: int = 0
    skipped: int = 0
    queued_bytes: int = 0
