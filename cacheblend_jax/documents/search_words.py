"""The words by which texts are searched, in every script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cache

# Scripts written without spaces between words: of letters (Thai, Lao, Myanmar, Khmer), of signs (kana, Han).
UNSPACED_LETTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
UNSPACED = UNSPACED_LETTERS + "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HANGUL = re.compile("[\uac00-\ud7a3]{3,}")
# Joiners, soft hyphens and the selectors of a character's looks: a word is the same with and without them.
INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
# What may be left out in writing: the vowel points of Hebrew and Arabic, and Arabic's lengthening of a line.
OPTIONAL = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670\u06d6-\u06ed]"
)
# Letters that Arabic and Persian writers take for each other, and the dot that lower case leaves of a Turkish capital.
SAME = str.maketrans("\u0623\u0625\u0622\u0671\u064a\u0649\u0643", "\u0627\u0627\u0627\u0627\u06cc\u06cc\u06a9")
DOTTED, PLAIN = "i\u0307", "i"
MARKS_AND_SYMBOLS = range(0x300, 0x1FFFF)  # where they are, except for those above
A_NAME = re.compile(r"(?<=\w )A(?!\w)")  # as in "plan A"; elsewhere it is an article


def search_words(text: str, stop_words: Collection[str] = ()) -> list[str]:
    """Returns the words by which a text is searched, without stop words.

    Words are runs of letters, digits and their marks. Forms of one character count as the same (NFKC and case): full
    width, ligatures, letters composed or not, with or without vowel points, digits of any script. Signs at the end
    belong to a name (`C++`, `F#`); a symbol, such as an emoji, is a word.

    Where a script has no spaces between words, short runs stand for them: of kana and Han, each character and each two
    neighbours; of Thai and its like, each two and three. A word of Hangul counts whole, and by its syllables in pairs,
    so that it is found whatever particle follows it.
    """
    visible = OPTIONAL.sub("", unicodedata.normalize("NFKC", INVISIBLE.sub("", text))).translate(SAME)
    names = {match.start() for match in A_NAME.finditer(visible)}
    words: list[str] = []
    for match in _word_pattern().finditer(visible):
        if match.lastgroup is not None:
            words += _runs(_cluster_pattern().findall(match[0]), (2, 3) if match.lastgroup == "letters" else (1, 2))
            continue
        word = unicodedata.normalize("NFKC", match[0].casefold().replace(DOTTED, PLAIN))
        if word not in stop_words or match.start() in names:
            words.append(_with_ascii_digits(word))
            words += [pair for syllables in HANGUL.findall(word) for pair in _runs(list(syllables), (2,))]
    return words


def _runs(clusters: Sequence[str], lengths: Sequence[int]) -> Iterator[str]:
    """Yields all runs of these lengths; of fewer characters than the shortest, all of them."""
    for length in lengths if len(clusters) >= lengths[0] else [len(clusters)]:
        for start in range(len(clusters) - length + 1):
            yield "".join(clusters[start : start + length])


def _with_ascii_digits(word: str) -> str:
    if word.isascii():
        return word
    return "".join(str(unicodedata.decimal(character, character)) for character in word)


@cache
def _word_pattern() -> re.Pattern[str]:
    """Matches a word, or, as the group `letters` or `signs`, a run of characters of a script without spaces."""
    mark, symbol = _marks_and_symbols()
    letter = rf"(?![{UNSPACED}_])[\w{mark}]"
    ending = r"(?:(?<=[A-Za-z])(?:\+\+|#)(?!\w))?"
    # Letters that an apostrophe cuts off, as in "Ana's" and "l'eau", are no words.
    long, single = rf"(?:{letter}){{2,}}{ending}", rf"(?<!['’]){letter}{ending}(?!['’])"
    letters = rf"(?P<letters>(?:(?=\w)[{UNSPACED_LETTERS}][{mark}]*)+)"
    signs = rf"(?P<signs>(?:(?=\w)(?![{UNSPACED_LETTERS}])[{UNSPACED}][{mark}]*)+)"
    return re.compile(rf"{letters}|{signs}|{long}|{single}|[{symbol}]")


@cache
def _cluster_pattern() -> re.Pattern[str]:
    """Matches a character of a script without spaces, with its marks."""
    mark, _ = _marks_and_symbols()
    return re.compile(rf"[{UNSPACED}][{mark}]*")


@cache
def _marks_and_symbols() -> tuple[str, str]:
    """Returns the insides of two classes: characters that belong to the one before, and symbols such as emoji."""
    marks, symbols = [], []
    for character in map(chr, MARKS_AND_SYMBOLS):
        category = unicodedata.category(character)
        if category.startswith("M"):
            marks.append(character)
        elif category == "So":
            symbols.append(character)
    return _character_class(marks), _character_class(symbols)


def _character_class(characters: Sequence[str]) -> str:
    """Returns characters as the inside of a regular expression's class, in ranges."""
    ranges: list[list[str]] = []
    for character in characters:
        if ranges and ord(character) == ord(ranges[-1][1]) + 1:
            ranges[-1][1] = character
        else:
            ranges.append([character, character])
    return "".join(f"{first}-{last}" for first, last in ranges)
