"""How many tokens stretches of one text count, of which many are asked for and most of the text is counted once."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

Span = tuple[int, int]  # (start, end): the stretch text[start:end]
CountAll = Callable[[Sequence[str]], Sequence[int]]  # texts -> how many tokens each has
WORDS_AT_ONCE = 2**16


class Part(NamedTuple):
    """A part text[start:end] that is counted by itself, with the separator after it where it ends a stretch."""

    start: int
    end: int
    ends_stretch: bool


class Measure:
    """Counts the tokens of stretches of one text, each with the separator after it.

    Without `border`, every stretch is counted as a whole. With it, words are counted once, wherever they stand, and
    what a stretch has before its first border and after its last: the sum is what the stretch as a whole would count.

    Args:
        border: matches, with no width, where any stretch may be cut such that its parts' tokens add up.
    """

    def __init__(
        self, text: str, count_all: CountAll, separator: str = "", border: re.Pattern[str] | None = None
    ) -> None:
        self.text = text
        self._count_all = count_all
        self._separator = separator
        self._borders = array("q", (match.start() for match in border.finditer(text)) if border else ())
        self._tokens_before = array("q", self._tokens_before_borders())
        self._known: dict[Part, int] = {}

    def all(self, spans: Iterable[Span]) -> list[int]:
        """Counts each stretch."""
        measured = [self._between_borders(*span) for span in spans]
        self._count({part for _, parts in measured for part in parts})
        return [tokens + sum(self._known[part] for part in parts) for tokens, parts in measured]

    def __call__(self, start: int, end: int) -> int:
        """Counts one stretch."""
        return self.all([(start, end)])[0]

    def _between_borders(self, start: int, end: int) -> tuple[int, list[Part]]:
        """Returns a stretch's tokens between its first border and its last, and the parts outside."""
        first, last = bisect_right(self._borders, start), bisect_left(self._borders, end) - 1
        if first > last:
            return 0, [Part(start, end, True)]
        tokens = self._tokens_before[last] - self._tokens_before[first]
        return tokens, [Part(start, self._borders[first], False), Part(self._borders[last], end, True)]

    def _count(self, parts: Iterable[Part]) -> None:
        unknown = [part for part in parts if part not in self._known]
        texts = [self.text[start:end] + self._separator * ends_stretch for start, end, ends_stretch in unknown]
        self._known.update(zip(unknown, self._count_all(texts), strict=True))

    def _tokens_before_borders(self) -> Iterable[int]:
        """Yields the tokens from the first border to each."""
        yield from [0] * bool(self._borders)
        counts: dict[str, int] = {}
        total = 0
        for first in range(0, len(self._borders) - 1, WORDS_AT_ONCE):
            borders = self._borders[first : first + WORDS_AT_ONCE + 1]
            words = [self.text[start:end] for start, end in pairwise(borders)]
            unknown = list(dict.fromkeys(word for word in words if word not in counts))
            counts.update(zip(unknown, self._count_all(unknown), strict=True))
            for word in words:
                total += counts[word]
                yield total
