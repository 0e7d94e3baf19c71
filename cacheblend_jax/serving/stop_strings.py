"""Ends an answer before a stop string, wherever the borders of tokens are."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets an answer's text through up to the first stop string; text that may begin one waits for what follows.

    The first is the one that ends first, the longest if several end there: this does not depend on tokens.

    Attributes:
        found: whether one was there: nothing after it comes through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""
        self.found = False

    def add(self, text: str) -> str:
        """Takes what an answer gained; returns what may be shown now."""
        if self.found:
            return ""
        self._waiting += text
        starts = {stop: start for stop in self._stops if (start := self._waiting.find(stop)) >= 0}
        if starts:
            self.found = True
            _, start = min((start + len(stop), start) for stop, start in starts.items())
            shown, self._waiting = self._waiting[:start], ""
            return shown
        cut = len(self._waiting) - self._overlap()
        shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return shown

    def rest(self) -> str:
        """Returns what still waits when the answer has ended."""
        rest, self._waiting = self._waiting, ""
        return rest

    def _overlap(self) -> int:
        """Returns how many of the last characters may begin a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._waiting))
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._waiting[-size:]) for stop in self._stops):
                return size
        return 0
