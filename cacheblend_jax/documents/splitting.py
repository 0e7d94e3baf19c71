"""Where a text is cut into chunks that count at most so many tokens: at paragraph borders where that is possible."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from cacheblend_jax.documents.measuring import CountAll, Measure, Span
from cacheblend_jax.documents.records import DocumentError, check_at_least_one

# A blank line, or the line break before a Markdown heading, which opens a paragraph even without a blank line.
PARAGRAPH_BORDER = re.compile(r"\n\s*\n|\n(?=#{1,6}[ \t])")
# One line "# Title", or a title underlined with = or -.
HEADING = re.compile(r"#{1,6}[ \t][^\n]*|[^\n]+\n(?:=+|-+)")
# White space after a full stop (perhaps with a closing quote or bracket); Chinese and Japanese need no space.
SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])\s+|(?<=[.!?…。！？][\"'”’)\]」』）])\s+"
    r"|(?<=[。！？])(?![。！？”’」』）])|(?<=[。！？][”’」』）])"
)
WORD = re.compile(r"\S+")
BORDER_TOKENS = 4  # two texts joined hardly ever count fewer tokens than the two apart less these


class Piece(NamedTuple):
    """A stretch text[start:end] that fits into a chunk, and the tokens that it counts on its own."""

    start: int
    end: int
    tokens: int


def split_into_chunks(text: str, chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Splits a text as `split_text` does, by any function that counts tokens.

    Raises:
        DocumentError: as `split_text`.
    """
    spans = cut(text, chunk_tokens, lambda texts: [count_tokens(each) for each in texts])
    return [text[start:end] for start, end in spans]


def cut(
    text: str,
    chunk_tokens: int,
    count_all: CountAll,
    *,
    separator: str = "",
    border: re.Pattern[str] | None = None,
) -> list[Span]:
    """Returns where the chunks of a text begin and end.

    Tokens do not add up: two texts joined may count more or fewer tokens than the two apart. So the sum of the
    paragraphs' counts only suggests how many fit, and each chunk is counted again as a whole.

    Args:
        separator: is counted with each chunk.
        border: where tokens do add up, if that is known (see `Measure`); it changes no cut, but spares counting.

    Raises:
        DocumentError: `chunk_tokens` is not a whole number of at least 1, or too small for one of the characters.
    """
    check_at_least_one("chunk_tokens", chunk_tokens)
    measure = Measure(text, count_all, separator, border)
    return list(_pack(list(_fitting_pieces(measure, chunk_tokens)), chunk_tokens, measure))


def _fitting_pieces(measure: Measure, chunk_tokens: int) -> Iterator[Piece]:
    """Yields paragraphs; of a paragraph that does not fit, its sentences; of such a sentence, runs of words."""
    paragraphs = list(_headed_paragraphs(measure.text))
    for (start, end, body), tokens in zip(paragraphs, measure.all([each[:2] for each in paragraphs]), strict=True):
        if tokens <= chunk_tokens:
            yield Piece(start, end, tokens)
            continue
        sentences = list(_between(SENTENCE_END, measure.text, start, end, after=body))
        for sentence, sentence_tokens in zip(sentences, measure.all(sentences), strict=True):
            if sentence_tokens <= chunk_tokens:
                yield Piece(*sentence, sentence_tokens)
            else:
                yield from _word_runs(*sentence, sentence_tokens, chunk_tokens, measure)


def _headed_paragraphs(text: str) -> Iterator[tuple[int, int, int]]:
    """Yields (start, end, body) of each paragraph together with the headings before it; its own text is at `body`."""
    headings_start: int | None = None
    end = 0
    for start, end in _between(PARAGRAPH_BORDER, text, 0, len(text)):
        first = start if headings_start is None else headings_start
        if HEADING.fullmatch(text, start, end):
            headings_start = first
        else:
            yield first, end, start
            headings_start = None
    if headings_start is not None:  # the text ends with headings
        yield headings_start, end, headings_start


def _between(border: re.Pattern[str], text: str, start: int, end: int, after: int = 0) -> Iterator[Span]:
    """Yields the non-blank stretches of text[start:end] between borders, trimmed; borders up to `after` don't count."""
    for match in border.finditer(text, start, end):
        if match.end() > after:
            yield from _trimmed(text, start, match.start())
            start = match.end()
    yield from _trimmed(text, start, end)


def _trimmed(text: str, start: int, end: int) -> Iterator[Span]:
    """Yields the stretch without white space at its ends, or nothing if it is blank."""
    stretch = text[start:end]
    if stripped := stretch.strip():
        start += len(stretch) - len(stretch.lstrip())
        yield start, start + len(stripped)


def _word_runs(start: int, end: int, tokens: int, chunk_tokens: int, measure: Measure) -> Iterator[Piece]:
    """Cuts a sentence of `tokens` tokens into the longest fitting runs of words, and a giant word into characters."""
    words = [match.span() for match in WORD.finditer(measure.text, start, end)]
    guess = len(words) * chunk_tokens // tokens
    first = 0
    while first < len(words):
        run_start = words[first][0]

        @cache
        def run_tokens(count: int, first: int = first) -> int:
            return measure(words[first][0], words[first + count - 1][1])

        count = _longest_fit(run_tokens, chunk_tokens, guess, len(words) - first)
        if count:
            yield Piece(run_start, words[first + count - 1][1], run_tokens(count))
        else:
            yield from _character_runs(*words[first], chunk_tokens, measure)
        guess = count
        first += max(count, 1)


def _character_runs(start: int, end: int, chunk_tokens: int, measure: Measure) -> Iterator[Piece]:
    """Cuts a word that fits nowhere into the longest fitting runs of characters."""
    guess = chunk_tokens
    while start < end:

        @cache
        def run_tokens(count: int, start: int = start) -> int:
            return measure(start, start + count)

        guess = _longest_fit(run_tokens, chunk_tokens, guess, end - start)
        if not guess:
            raise DocumentError(
                f"chunk_tokens is {chunk_tokens}, but the character {measure.text[start]!r} alone counts "
                f"{run_tokens(1)} tokens: expected room for every character; raise chunk_tokens"
            )
        yield Piece(start, start + guess, run_tokens(guess))
        start += guess


def _pack(pieces: Sequence[Piece], chunk_tokens: int, measure: Measure) -> Iterator[Span]:
    """Joins neighbouring pieces, as many as fit, into the (start, end) of each chunk."""
    totals = [0, *accumulate(piece.tokens for piece in pieces)]
    first = 0
    while first < len(pieces):
        counted = {1: pieces[first].tokens}  # each piece is known to fit alone

        def joined_tokens(count: int, first: int = first, counted: dict[int, int] = counted) -> int:
            last = pieces[first + count - 1]
            if count not in counted:
                least = counted.get(count - 1, 0) + last.tokens - BORDER_TOKENS
                counted[count] = least if least > chunk_tokens else measure(pieces[first].start, last.end)
            return counted[count]

        guess = bisect_right(totals, totals[first] + chunk_tokens) - 1 - first
        count = max(_longest_fit(joined_tokens, chunk_tokens, guess, len(pieces) - first), 1)
        yield pieces[first].start, pieces[first + count - 1].end
        first += count


def _longest_fit(tokens_of: Callable[[int], int], limit: int, guess: int, most: int) -> int:
    """Finds the largest count in 1..most with tokens_of(count) <= limit, starting near `guess`; 0 if none fits.

    Strides away from the guess double until one count fits and a larger one does not; bisection then closes in. A
    good guess calls `tokens_of` twice, a bad one logarithmically often. What is returned has been seen to fit, even
    where `tokens_of` is not quite monotonic.
    """
    fitting, failing = 0, most + 1
    probe, stride = min(max(guess, 1), most), 1
    while failing - fitting > 1:
        if tokens_of(probe) <= limit:
            fitting = probe
            probe = probe + stride
        else:
            failing = probe
            probe = probe - stride
        stride *= 2
        if not fitting < probe < failing:
            probe = (fitting + failing) // 2
    return fitting
