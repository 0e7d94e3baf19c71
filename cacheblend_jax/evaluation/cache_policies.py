"""Eviction by itself: the store's tier beside plain LRU and beside what knowing the future would reach.

Each takes uses of keys, in order, into one tier of so many bytes, and says which of them were hits.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from cacheblend_jax.store.memory import MemoryTier
from cacheblend_jax.store.tiered_memory import HasRoom, TieredMemory

Hits = Bool[np.ndarray, " uses"]


@dataclass(frozen=True)
class SizedEntry:
    """An entry without KV."""

    num_bytes: int


def stored_hits(keys: Int[np.ndarray, " uses"], sizes: Int[np.ndarray, " keys"], capacity: int) -> Hits:
    """The store's tier in host memory, and its disk: every missed entry is put."""
    tier: MemoryTier[SizedEntry] = MemoryTier(capacity)
    entries = [SizedEntry(size) for size in sizes.tolist()]
    hits = np.zeros(keys.size, bool)
    for place, key in enumerate(keys.tolist()):
        name = str(key)
        if tier.get(name) is not None:
            hits[place] = True
        else:
            tier.put(name, entries[key], 1)
    return hits


def promoted_hits(keys: Int[np.ndarray, " uses"], sizes: Int[np.ndarray, " keys"], capacity: int) -> Hits:
    """The store's tier on the device: an entry is promoted to it where it displaces none used as much lately."""
    memory: TieredMemory[SizedEntry, SizedEntry] = TieredMemory(1, capacity, threading.Lock())
    entries = [SizedEntry(size) for size in sizes.tolist()]
    hits = np.zeros(keys.size, bool)
    for place, key in enumerate(keys.tolist()):
        name, entry = str(key), entries[key]
        hits[place] = memory.use(name)[1] is not None
        memory.count_use(name)
        if not hits[place]:
            memory.promote(name, partial(_read, entry), lambda entry: entry)
    return hits


def _read(entry: SizedEntry, key: str, has_room: HasRoom) -> tuple[SizedEntry, int]:
    """Reads an entry from a tier that has all of them."""
    return entry, 1


def lru_hits(keys: Int[np.ndarray, " uses"], sizes: Int[np.ndarray, " keys"], capacity: int) -> Hits:
    """The least recently used entries go first, whatever came in."""
    room, held = capacity, OrderedDict[int, int]()
    all_sizes, hits = sizes.tolist(), np.zeros(keys.size, bool)
    for place, key in enumerate(keys.tolist()):
        if key in held:
            hits[place] = True
            held.move_to_end(key)
            continue
        size = all_sizes[key]
        if size > capacity:
            continue
        while room < size:
            room += held.popitem(last=False)[1]
        held[key] = size
        room -= size
    return hits


def next_uses(keys: Int[np.ndarray, " uses"]) -> Int[np.ndarray, " uses"]:
    """Returns the place of each use's next one of the same key; the number of uses where there is none."""
    order = np.lexsort((np.arange(keys.size), keys))
    again = keys[order][1:] == keys[order][:-1]
    following = np.full(keys.size, keys.size, np.int64)
    following[order[:-1][again]] = order[1:][again]
    return following


def belady_hits(keys: Int[np.ndarray, " uses"], capacity: int) -> Hits:
    """The optimum for entries of one size, `capacity` of which fit: what is wanted latest goes, or never comes in.

    Source: Belady (1966), "A study of replacement algorithms for a virtual-storage computer": MIN.
    """
    following, held = next_uses(keys).tolist(), dict[int, int]()  # the next use of each entry that is kept
    latest: list[tuple[int, int]] = []  # the same, the latest first; those that were used since are skipped
    hits = np.zeros(keys.size, bool)
    for place, key in enumerate(keys.tolist()):
        hits[place] = key in held
        held[key] = following[place]
        heapq.heappush(latest, (-following[place], key))
        while len(held) > capacity:
            after, other = heapq.heappop(latest)
            if held.get(other) == -after:
                del held[other]
    return hits


def most_hits(keys: Int[np.ndarray, " uses"], sizes: Int[np.ndarray, " keys"], capacity: int) -> Hits:
    """Returns hits that no policy exceeds in number, for entries of any sizes. No policy need reach it.

    To hit a use, the entry must be kept since the one before: its bytes times that long. All of these areas together
    are at most the tier's bytes times the length of the trace; the smallest are taken while they fit.

    Source: Berger, Beckmann and Harchol-Balter (2018), "Practical bounds on optimal caching with variable object
    sizes": the lower bound on misses, PFOO-L.
    """
    following = next_uses(keys)
    is_again = following < keys.size
    first = np.flatnonzero(is_again)
    areas = sizes[keys[first]].astype(np.float64) * (following[first] - first)
    order = np.argsort(areas, kind="stable")
    fitting = order[np.cumsum(areas[order]) <= float(capacity) * keys.size]
    hits = np.zeros(keys.size, bool)
    hits[following[first[fitting]]] = True
    return hits


POLICIES: dict[str, Callable[[Int[np.ndarray, " uses"], Int[np.ndarray, " keys"], int], Hits]] = {
    "LRU": lru_hits,
    "store (put)": stored_hits,
    "store (promoted)": promoted_hits,
    "bound": most_hits,
}
