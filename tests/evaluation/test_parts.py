"""A prompt's tokens as people read them: together the text, each with what it adds."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import HF
from transformers import AutoTokenizer

import cacheblend_jax as cb
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.evaluation.parts import Part, parts_of, printable, shortened, token_texts, word

TEXTS = ["Ana joined the Cobalt team.\n\nIt is in Oslo.", "日本語 – naïve 👩‍👩‍👧 text", "", "a", "  two  blanks ", "\n"]


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters span several."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizers():
    demo = cb.load_model("demo").tokenizer
    return {"bytes": Bytes(), "demo": demo, "llama3": AutoTokenizer.from_pretrained(HF / "llama3")}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["bytes", "demo", "llama3"])
def test_the_tokens_texts_are_together_the_text(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = list(tokenizer.encode(text))
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_the_last_ones_text():
    assert token_texts(Bytes(), list("aé日".encode())) == ["a", "", "é", "", "", "日"]


def test_bytes_that_are_no_character_hold_up_none_of_those_that_follow():
    ids = [0xFF] * 9 + list(b"Oslo")
    assert token_texts(Bytes(), ids)[-3:] == ["s", "l", "o"]
    assert "".join(token_texts(Bytes(), ids)) == Bytes().decode(ids)


def test_without_a_tokenizer_tokens_are_called_by_their_ids():
    assert token_texts(None, [3, 14]) == ["3 ", "14 "]


def test_parts_stand_one_after_the_other():
    ids = [np.zeros(size, np.int32) for size in (2, 3, 4, 0)]
    prompt = TokenizedPrompt(ids[0], tuple(ids[1:3]), ids[3])
    wanted = (Part("prefix", 0, 2), Part("chunk 0", 2, 5), Part("chunk 1", 5, 9), Part("question", 9, 9))
    assert parts_of(prompt) == wanted
    assert [part.name for part in parts_of(prompt, ["a", "b"])] == ["prefix", "a", "b", "question"]
    with pytest.raises(cb.CacheBlendError, match="each of the prompt's 2 chunks, got 1"):
        parts_of(prompt, ["a"])


def test_labels_are_short_and_can_be_printed():
    assert printable("a\x00\t\x85\udc80\ufffe\n") == "a␀\t\ufffd\ufffd\ufffd\n"
    assert shortened("guide/how-it-works.md 12", 12) == "guide….md 12"
    assert len(shortened("x" * 100, 12)) == 12
    assert [word(text) for text in (" Oslo", "\n\n", "  ", "", "a\tb")] == ["Oslo", "¶¶", "␣", "·", "a⇥b"]
