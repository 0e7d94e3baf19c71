"""Between which characters a text may be cut without changing its tokens: there, the parts' counts add up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from cacheblend_jax.model.encoding import is_read_as_text
from cacheblend_jax.model.gguf_tokenizer import LLAMA3_WORDS, QWEN2_WORDS, TEKKEN_WORDS

# No word of GPT-2's pattern has white space after anything else. Its lookahead, and those of the patterns below, is
# for white space alone; none looks behind. So what stands on one side of such a border changes nothing on the other.
AFTER_A_WORD = re.compile(r"(?<=\S)(?=[ \t\r\n])")
# In these patterns line breaks may belong to the punctuation before them.
AFTER_LETTERS_OR_BEFORE_A_SPACE = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])|(?<=\S)(?= )")
PATTERNS = frozenset((LLAMA3_WORDS, QWEN2_WORDS, TEKKEN_WORDS))


class WordBorders(NamedTuple):
    """Where any text may be cut: the tokens of its parts, encoded each by itself, are the whole's."""

    pattern: re.Pattern[str]  # matches borders, with no width
    composing: Any  # the tokenizer's NFC normalizer, or `None`

    def within(self, text: str, separator: str = "") -> re.Pattern[str] | None:
        r"""Returns what matches where any stretch of `text`, with `separator` after it, may be cut, if that is known.

        >>> borders.within(text).split("Two words, and\n\nmore")
        ['Two', ' words,', ' and', '\n\nmore']
        """
        if self.composing is None:
            return self.pattern
        # Where all of a text is composed, its stretches are, too.
        is_composed = text.isascii() or self.composing.normalize_str(text) == text
        return self.pattern if is_composed and separator.isascii() else None


def word_borders(tokenizer: Any) -> WordBorders | None:
    """Returns where texts may be cut, as far as it is known.

    Known it is of tokenizers that split a text into words by the patterns of GPT-2, Llama 3, Qwen 2 or Tekken, and
    merge within each word. Others may merge anywhere (SentencePiece's).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return None
    pattern = _pattern_of(list(_steps(_state(backend.pre_tokenizer))))
    normalizer = backend.normalizer
    if pattern is None or not (normalizer is None or _state(normalizer)["type"] == "NFC"):
        return None
    for number, token in backend.get_added_tokens_decoder().items():
        if not is_read_as_text(tokenizer, number, token) or re.search(r"\s", token.content):
            return None
    return WordBorders(pattern, normalizer)


def _state(step: Any) -> dict[str, Any]:
    return json.loads(step.__getstate__())


def _steps(pre_tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if pre_tokenizer["type"] == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    else:
        yield pre_tokenizer


def _pattern_of(steps: list[dict[str, Any]]) -> re.Pattern[str] | None:
    if not steps:
        return None
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    patterns = [AFTER_A_WORD] if last["use_regex"] else []
    for step in splits:
        if step["type"] == "Split" and _is_known(step):
            patterns.append(AFTER_LETTERS_OR_BEFORE_A_SPACE)
        elif step["type"] != "Digits":  # which splits beside digits alone, whatever surrounds them
            return None
    return patterns[-1] if patterns else None


def _is_known(split: dict[str, Any]) -> bool:
    return split["pattern"].get("Regex") in PATTERNS and split["behavior"] == "Isolated" and not split["invert"]
