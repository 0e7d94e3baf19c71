"""How often entries were used lately: what decides whether one is copied into a faster tier in place of others."""

from __future__ import annotations

from collections import Counter, deque

WINDOW = 2**14  # look-ups


class RecentUses:
    """Counts the last uses, by key. Not thread-safe by itself.

    Args:
        window: how many uses are remembered.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._latest: deque[str] = deque()
        self._window = window
        self._counts: Counter[str] = Counter()

    def add(self, key: str) -> None:
        """Counts a use, and forgets the oldest beyond the window."""
        self._latest.append(key)
        self._counts[key] += 1
        if len(self._latest) > self._window:
            oldest = self._latest.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def exceeds(self, key: str, other: str) -> bool:
        """Returns whether an entry was used at least twice more than another.

        Entries of one request differ by one while another request is looking them up: that is no reason to swap them.
        """
        return self._counts[key] >= self._counts[other] + 2
