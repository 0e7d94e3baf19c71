"""Picks the chunks that share the most telling words with a question (BM25), and says what any retriever is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from cacheblend_jax.documents.records import Chunk, DocumentError, check_at_least_one
from cacheblend_jax.documents.search_words import search_words

SHINGLE_WORDS = 3
NEARLY_ALL = 0.8  # of the runs of so many words that two texts have in all: both have them


class Retriever(Protocol):
    """What finds the chunks to answer a question from: `BM25Retriever`, or an adapter of another library's."""

    def retrieve(self, question: str) -> Sequence[Chunk]:
        """Returns chunks in the order in which a prompt is to have them."""
        ...


class BM25Retriever:
    """Finds the chunks that share the most telling words with a question: BM25 rewards rare words the most.

    The same text counts once. Of chunks with nearly the same text (versions of a page, say) the most relevant counts;
    the others come after everything else that has a word of the question.

    Words are runs of letters and digits, whatever their case; in scripts written without spaces, short runs of
    characters.

    Args:
        chunks: all that may be found, indexed here once.
        top_k: how many to return.

    Raises:
        DocumentError: `top_k` is not a whole number of at least 1, or the package bm25s is missing.
    """

    def __init__(self, chunks: Sequence[Chunk], top_k: int = 5) -> None:
        check_at_least_one("top_k", top_k)
        bm25s = _import_bm25s()
        first: dict[str, Chunk] = {}
        for chunk in chunks:
            first.setdefault(" ".join(chunk.text.split()), chunk)
        self._chunks = list(first.values())
        self._top_k = top_k
        self._stop_words = frozenset(bm25s.stopwords.STOPWORDS_EN)
        self._words = [search_words(chunk.text, self._stop_words) for chunk in self._chunks]
        self._vocabulary = {word for words in self._words for word in words}
        self._index = bm25s.BM25()
        if self._vocabulary:
            self._index.index(self._words, show_progress=False)

    def retrieve(self, question: str) -> list[Chunk]:
        """Returns the `top_k` chunks most relevant to the question, in the order in which they were given.

        In the order of the documents a definition stays before its use, and the chunks read as an abridged text.
        """
        return self.in_order(self.ranked(question))

    def ranked(self, question: str) -> list[Chunk]:
        """Returns the `top_k` chunks, the most relevant to the question first, earlier ones before their equals."""
        scores = self._scores(question)
        order = sorted(range(len(scores)), key=lambda number: -scores[number])  # stable: ties keep their order
        return [self._chunks[number] for number in islice(self._distinct_first(order, scores), self._top_k)]

    def in_order(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Returns chunks of this retriever in the order in which they were given to it."""
        wanted = set(map(id, chunks))
        return [chunk for chunk in self._chunks if id(chunk) in wanted]

    def _scores(self, question: str) -> list[float]:
        """Scores each chunk; all zero where BM25 is undefined, because no word of the question is in any text."""
        known = [word for word in search_words(question, self._stop_words) if word in self._vocabulary]
        return self._index.get_scores(known).tolist() if known else [0.0] * len(self._chunks)

    def _distinct_first(self, order: Sequence[int], scores: Sequence[float]) -> Iterator[int]:
        """Yields numbers of chunks in order; nearly the same ones as one before wait for the last that is relevant."""
        taken, waiting = TakenTexts(), list[int]()
        for number in order:
            if scores[number] <= 0:
                yield from waiting
                waiting = []
            elif taken.has_nearly(self._words[number]):
                waiting.append(number)
                continue
            yield number
        yield from waiting


class TakenTexts:
    """Texts by their words; recognises one that has nearly all its runs of words in common with another."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, ...], list[int]] = {}  # of a run of words: the numbers of texts that have it
        self._sizes: list[int] = []

    def has_nearly(self, words: Sequence[str]) -> bool:
        """Returns whether nearly the same text is there already; takes it otherwise."""
        starts = range(max(len(words) - SHINGLE_WORDS, 0) + 1)
        shingles = {tuple(words[start : start + SHINGLE_WORDS]) for start in starts}
        common = Counter(holder for shingle in shingles for holder in self._holders.get(shingle, ()))
        if any(
            shared >= NEARLY_ALL * (len(shingles) + self._sizes[holder] - shared) for holder, shared in common.items()
        ):
            return True
        for shingle in shingles:
            self._holders.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(shingles))
        return False


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise DocumentError(
            "choosing chunks by relevance needs the package bm25s: "
            "install it with pip install 'cacheblend-jax[retrieval]', or use every chunk with --all"
        ) from error
    return bm25s
