"""Which entries are copied into faster tiers: those that displace nothing used as much."""

from __future__ import annotations

from store_cases import fill, key_of, make_entry

import cacheblend_jax as cb
from cacheblend_jax.store.entry_reader import EntryReader
from cacheblend_jax.store.recent_uses import RecentUses


def test_uses_beyond_the_window_are_forgotten():
    uses = RecentUses(window=4)
    for key in "aaab":
        uses.add(key)
    assert uses.exceeds("a", "b")
    for key in "bb":
        uses.add(key)
    assert not uses.exceeds("a", "b")
    assert uses.exceeds("b", "a")


def test_one_use_more_is_no_reason_to_swap():
    uses = RecentUses()
    for key in "aab":
        uses.add(key)
    assert not uses.exceeds("a", "b")
    uses.add("a")
    assert uses.exceeds("a", "b")


def test_entries_used_alike_that_do_not_all_fit_are_not_swapped(tmp_path, monkeypatch):
    """Five requests of four chunks, with room for two, read no entry in vain."""
    fill(tmp_path, range(5))
    with cb.ChunkStore(tmp_path, host_bytes=2 * make_entry(0).num_bytes) as store:
        whole, tiers = [], []
        monkeypatch.setattr(EntryReader, "read", counted(EntryReader.read, whole))

        def request(seeds):
            for seed in seeds:
                with store.open(key_of(seed)) as chunk:
                    tiers.append(chunk.tier)
            for seed in seeds:
                store.promote(key_of(seed))

        for _ in range(5):
            request(range(4))
        assert len(whole) == 2
        assert tiers == ["disk"] * 4 + ["host", "host", "disk", "disk"] * 4
        for _ in range(8):  # used more by now than what it displaces
            request([4])
        assert len(whole) == 3
        assert tiers[-1] == "host"


def counted(read, calls):
    def count(self):
        calls.append(self)
        return read(self)

    return count
