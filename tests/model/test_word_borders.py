"""Where texts may be cut: parts encoded by themselves have the tokens of the whole, in every script."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cacheblend_jax.documents.measuring import Measure
from cacheblend_jax.documents.splitting import cut
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.encoding import count_all, encode
from cacheblend_jax.model.gguf_tokenizer import LLAMA3_WORDS, QWEN2_WORDS, TEKKEN_WORDS
from cacheblend_jax.model.word_borders import word_borders

PROSE = (files("cacheblend_jax.engine") / "neutral_text.txt").read_text(encoding="utf-8")
SCRIPTS = [
    "The question's answer isn't here: they'll go (1984), \"we've\" said. x_y = f(a/b)!\n/usr/bin\t\tend...\n\n# Ti\n",
    "你好，世界。今天是2024年。「是的」！\n我们走吧。",
    "これはテストです。 そうですね？ カタカナ\u3000全角",
    "ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "नमस्ते दुनिया। क्षत्रिय १२३",
    "مرحبا بالعالم، ١٢٣؟",
    "Où é e\u0301 \u1e9b\u0323 ﬁ Å ÅNGSTRÖM\u00a0naïve",
    "👩‍👩‍👧 ok 🇨🇭🏳️‍🌈 \u200b\ufeff\u2028 \u2029\x85 \x1c \x0b\x0c",
    "\r\na\r\n\r\nb \r\n 'S 's ''s 's\n'll 12\n34 5 67\r8 ½ Ⅷ ²",
    "<think> a</s> [INST]x<think>\n</think>",
]
FRAGMENTS = st.sampled_from(
    [part for script in SCRIPTS for part in re.findall(r"\w+|\W", script)] + [" ", "  ", "\n", "\r\n", "\t", "\n\n"]
)
TEXTS = st.lists(st.one_of(FRAGMENTS, FRAGMENTS, st.characters(exclude_categories=["Cs"])), max_size=60).map("".join)
SPLITS = {
    "gpt-2": [],
    "digits": [pre_tokenizers.Digits(individual_digits=True)],
    "llama3": [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")],
    "tekken": [pre_tokenizers.Split(Regex(TEKKEN_WORDS), "isolated")],
}


def trained(splits: list, normalizer=None, *, has_gpt2_words: bool = False, has_prefix: bool = False):
    """A tokenizer with merges over whatever its words hold: white space, line breaks and several bytes of a script."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix, use_regex=has_gpt2_words)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([PROSE, *SCRIPTS * 5], trainer)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens(
        [AddedToken("<think>"), AddedToken("</think>", lstrip=True), AddedToken("[INST]", single_word=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module", params=SPLITS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    name = request.param
    composing = normalizers.NFC() if name == "qwen2" else None
    return trained(SPLITS[name], composing, has_gpt2_words=name in ("gpt-2", "digits"))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example(text=" ".join(SCRIPTS))
@example(text="\n".join(SCRIPTS))
def test_tokens_of_parts_are_those_of_the_whole(tokenizer, text):
    border = word_borders(tokenizer).within(text)
    if border is None:
        assert tokenizer.backend_tokenizer.normalizer.normalize_str(text) != text
        return
    parts = border.split(text)
    assert "".join(parts) == text
    assert [number for part in parts for number in encode(tokenizer, part)] == encode(tokenizer, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, separator=st.sampled_from(["", "\n\n", " ", "</s>", "。", "\u0301"]), places=st.data())
def test_measured_stretches_count_what_they_are_encoded_as(tokenizer, text, separator, places):
    border = word_borders(tokenizer).within(text, separator)
    measure = Measure(text, lambda texts: count_all(tokenizer, texts), separator, border)
    places = places.draw(st.lists(st.tuples(*[st.integers(0, len(text))] * 2), max_size=5))
    spans = [(min(pair), max(pair)) for pair in places]
    expected = [len(encode(tokenizer, text[start:end] + separator)) for start, end in spans]
    assert measure.all(spans) == expected
    assert [measure(*span) for span in spans] == expected


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, chunk_tokens=st.integers(1, 60), separator=st.sampled_from(["", "\n\n", "。"]))
@example(text=" ".join(SCRIPTS * 3), chunk_tokens=30, separator="\n\n")
@example(text=PROSE + "\r\n\r\n" + PROSE, chunk_tokens=100, separator="\n\n")
def test_borders_change_no_cut(tokenizer, text, chunk_tokens, separator):
    def count_all_separated(texts: list[str]) -> list[int]:
        return [len(encode(tokenizer, each + separator)) for each in texts]

    border = word_borders(tokenizer).within(text, separator)
    try:
        expected = cut(text, chunk_tokens, count_all_separated)
    except CacheBlendError as error:  # no room for one of the characters
        with pytest.raises(type(error), match="raise chunk_tokens"):
            cut(text, chunk_tokens, lambda texts: count_all(tokenizer, texts), separator=separator, border=border)
        return
    spans = cut(text, chunk_tokens, lambda texts: count_all(tokenizer, texts), separator=separator, border=border)
    assert spans == expected
    assert all(len(encode(tokenizer, text[start:end] + separator)) <= chunk_tokens for start, end in spans)


def test_a_text_is_counted_little_more_than_once(tokenizer):
    characters = 0

    def counts(texts: list[str]) -> list[int]:
        nonlocal characters
        characters += sum(map(len, texts))
        return count_all(tokenizer, texts)

    text = "\n\n".join([PROSE] * 10)
    cut(text, 100, counts, separator="\n\n", border=word_borders(tokenizer).within(text, "\n\n"))
    assert characters < 0.5 * len(text)  # of the words, most are there several times


def with_added(*tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = trained(SPLITS["llama3"])
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def without_steps() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_added(AddedToken("word")),
        lambda: with_added(AddedToken("<a b>")),
        lambda: trained(SPLITS["llama3"], normalizers.Lowercase()),
        lambda: trained(SPLITS["llama3"], has_prefix=True),
        lambda: trained([pre_tokenizers.Split(Regex(r"\S+\s*"), "isolated")]),
        lambda: trained([pre_tokenizers.Split(Regex(LLAMA3_WORDS), "merged_with_next")]),
        lambda: trained([pre_tokenizers.Punctuation()], has_gpt2_words=True),
        lambda: trained([pre_tokenizers.Digits()]),
        lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())),
        without_steps,
        object,
    ],
    ids="word spaced lowercase prefix pattern behaviour step no-words merging no-steps slow".split(),
)
def test_no_border_is_known_of_other_tokenizers(make):
    assert word_borders(make()) is None


def test_composing_forbids_borders_only_in_texts_that_it_changes():
    borders = word_borders(trained(SPLITS["qwen2"], normalizers.NFC()))
    assert borders.within("a b") is not None
    assert borders.within("é b") is not None
    assert borders.within("e\u0301 b") is None
    assert borders.within("a b", "\u0301") is None
