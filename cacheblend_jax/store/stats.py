"""What a store counts: the whole of it, and its disk tier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStats:
    """Counts since the store was made; `entries` and `bytes` are what memory holds now, `disk_…` what the disk does.

    Attributes:
        hits, misses: of `get` and `open`; of the hits, `device_hits` were on the device and `disk_hits` on the disk.
        stored: entries put and kept.
        evicted, disk_evicted, device_evicted: entries that made room for others.
        rejected: entries larger than the memory, or without room among entries in use; `disk_rejected`: than the disk.
        written: entries written to the disk.
        dropped: entries not written because the queue was full, or no thread could be started.
        damaged: entries (or indexes) whose bytes were not those written; quarantined.
        outdated: entries of another format version, treated as missing.
        write_errors, read_errors: what the file system refused; the entries stay in memory, or are misses.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    rejected: int = 0
    entries: int = 0
    bytes: int = 0
    device_hits: int = 0
    device_evicted: int = 0
    device_entries: int = 0
    device_bytes: int = 0
    disk_hits: int = 0
    written: int = 0
    dropped: int = 0
    disk_evicted: int = 0
    disk_rejected: int = 0
    disk_entries: int = 0
    disk_bytes: int = 0
    damaged: int = 0
    outdated: int = 0
    write_errors: int = 0
    read_errors: int = 0


@dataclass
class DiskCounts:
    """What a disk tier counts; see `StoreStats`."""

    written: int = 0
    evicted: int = 0
    rejected: int = 0
    damaged: int = 0
    outdated: int = 0
    write_errors: int = 0
    read_errors: int = 0
