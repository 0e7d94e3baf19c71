"""Texts that are encoded once, for each tenant."""

from __future__ import annotations

import pytest

import cacheblend_jax as cb
from cacheblend_jax.serving.known_texts import ENTRY_CHARACTERS, KnownTexts


class CountingTokenizer:
    def __init__(self):
        self.encoded: list[str] = []

    def encode(self, text, **options):
        self.encoded.append(text)
        return [ord(letter) for letter in text]


def test_a_text_is_encoded_once_for_each_tenant():
    tokenizer = CountingTokenizer()
    texts = KnownTexts(tokenizer)
    first = texts.encode("ada", "ab")
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0  # all who ask share it
    assert [texts.encode(tenant, "ab").tolist() for tenant in ("ada", "bob")] == [[97, 98]] * 2
    assert tokenizer.encoded == ["ab", "ab"]
    assert texts.encode("ada", "ab", control_tokens=True).tolist() == [97, 98]
    assert tokenizer.encoded == ["ab"] * 3  # another question than before
    with pytest.raises(cb.PromptError, match="valid Unicode"):
        texts.encode("ada", "\ud800")


def test_the_texts_used_last_are_kept():
    tokenizer = CountingTokenizer()
    texts, too_long = KnownTexts(tokenizer, most_characters=2 * ENTRY_CHARACTERS + 6), "x" * (ENTRY_CHARACTERS + 7)
    for text in ("aa", "bb", "aa", "cccc", "aa", too_long, "aa", "bb"):
        texts.encode("", text)
    assert tokenizer.encoded == ["aa", "bb", "cccc", too_long, "bb"]
