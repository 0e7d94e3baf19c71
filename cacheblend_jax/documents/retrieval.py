"""Picks the chunks that share the most telling words with a question (BM25)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from cacheblend_jax.documents.records import Chunk, DocumentError, check_at_least_one

# Thai, Lao, Myanmar, Khmer, kana, Han: written without spaces between words.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Joiners, soft hyphens and the selectors of a character's looks: a word is the same with and without them.
INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
MARKS_AND_SYMBOLS = range(0x300, 0x1FFFF)  # where they are, except for those above
A_NAME = re.compile(r"(?<=\w )A(?!\w)")  # as in "plan A"; elsewhere it is an article


def select_top_k(chunks: Sequence[Chunk], question: str, top_k: int) -> list[Chunk]:
    """Picks the `top_k` chunks most relevant to the question by BM25, and returns them in their original order.

    The order of relevance is dropped after the choice: in the order of the documents a definition stays before its use,
    and the chunks read as an abridged text. Of chunks with the same text only the first counts.

    Raises:
        DocumentError: `top_k` is not a whole number of at least 1, or the package bm25s is missing.
    """
    check_at_least_one("top_k", top_k)
    return [chunks[number] for number in sorted(by_relevance(chunks, question)[:top_k])]


def by_relevance(chunks: Sequence[Chunk], question: str) -> list[int]:
    """Returns the numbers of chunks, the most relevant to the question first; of the same text, only the first chunk's.

    BM25 rewards the question's words, rare words the most. Of equally relevant chunks the earlier come first.

    Raises:
        DocumentError: the package bm25s is missing.
    """
    bm25s = _import_bm25s()
    first = {" ".join(chunk.text.split()): number for number, chunk in reversed(list(enumerate(chunks)))}
    numbers = sorted(first.values())
    scores = _bm25_scores(bm25s, [chunks[number].text for number in numbers], question)
    ranked = sorted(range(len(numbers)), key=lambda place: -scores[place])  # stable: ties keep their order
    return [numbers[place] for place in ranked]


def search_words(text: str, stop_words: Collection[str] = ()) -> list[str]:
    """Returns the words by which a text is searched, without stop words.

    Words are runs of letters, digits and their marks. Forms of one character count as the same (NFKC and case): full
    width, ligatures, letters composed or not. Signs at the end belong to a name (`C++`, `F#`); a symbol, such as an
    emoji, is a word; in scripts that are written without spaces, so is every character.
    """
    visible = unicodedata.normalize("NFKC", INVISIBLE.sub("", text))
    names = {match.start() for match in A_NAME.finditer(visible)}
    words = []
    for match in _word_pattern().finditer(visible):
        word = unicodedata.normalize("NFKC", match[0].casefold())
        if word not in stop_words or match.start() in names:
            words.append(word)
    return words


@cache
def _word_pattern() -> re.Pattern[str]:
    marks, symbols = [], []
    for character in map(chr, MARKS_AND_SYMBOLS):
        category = unicodedata.category(character)
        if category.startswith("M"):
            marks.append(character)
        elif category == "So":
            symbols.append(character)
    mark = _character_class(marks)
    letter = rf"(?![{UNSPACED}_])[\w{mark}]"
    signs = r"(?:(?<=[A-Za-z])(?:\+\+|#)(?!\w))?"
    # Letters that an apostrophe cuts off, as in "Ana's" and "l'eau", are no words.
    long, single = rf"(?:{letter}){{2,}}{signs}", rf"(?<!['’]){letter}{signs}(?!['’])"
    return re.compile(rf"(?=\w)[{UNSPACED}][{mark}]*|{long}|{single}|[{_character_class(symbols)}]")


def _character_class(characters: Sequence[str]) -> str:
    """Returns characters as the inside of a regular expression's class, in ranges."""
    ranges: list[list[str]] = []
    for character in characters:
        if ranges and ord(character) == ord(ranges[-1][1]) + 1:
            ranges[-1][1] = character
        else:
            ranges.append([character, character])
    return "".join(f"{first}-{last}" for first, last in ranges)


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise DocumentError(
            "choosing chunks by relevance needs the package bm25s: "
            "install it with pip install 'cacheblend-jax[retrieval]', or use every chunk with --all"
        ) from error
    return bm25s


def _bm25_scores(bm25s: Any, texts: list[str], question: str) -> list[float]:
    """Scores each text; all zero where BM25 is undefined, because no word of the question is in any text."""
    stop_words = frozenset(bm25s.stopwords.STOPWORDS_EN)
    corpus = [search_words(text, stop_words) for text in texts]
    in_corpus = {word for words in corpus for word in words}
    known = [word for word in search_words(question, stop_words) if word in in_corpus]
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    return index.get_scores(known).tolist()
