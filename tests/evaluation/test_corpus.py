"""The bundled corpus: its documents, its questions, and the tokenizer that reads it."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.evaluation.corpus import (
    KINDS,
    NAMES,
    NICKNAMES,
    PREFIX,
    draw_document,
    examples,
    split_words,
    vocabulary,
)


@pytest.fixture(scope="module")
def demo():
    return cb.load_model("demo", dtype="float32")


def test_documents_are_as_long_as_promised_and_define_before_use():
    rng = np.random.default_rng(3)
    known = set(vocabulary())
    for _ in range(100):
        document = draw_document(rng)
        lengths = [len(split_words(chunk)) for chunk in document.chunks]
        assert 6 <= len(lengths) <= 12
        assert min(lengths) >= 32
        assert max(lengths) <= 104  # a sentence may go over
        assert set(split_words(" ".join(document.chunks))) <= known
        for question in document.questions:
            assert set(split_words(question.text)) | {question.answer} <= known
            if question.kind == "reference":
                definition, use = question.chunks
                assert definition < use
                assert question.answer in document.chunks[use]
                name = next(word for word in split_words(question.text) if word in NAMES)
                assert name in split_words(document.chunks[definition])
                assert name not in split_words(document.chunks[use])  # nothing there says whose the fact is


def sentences_of(example):
    return [split_words(sentence) for chunk in example.chunks for sentence in chunk.split(". ")]


def people_of(example):
    """Who has which nickname, by the sentences that define them."""
    nicknames = {}
    for words in sentences_of(example):
        words = [word for word in words if word != "."]
        if words[0] in NAMES and words[-1] in NICKNAMES:
            nicknames[words[-1]] = words[0]
    return nicknames


def test_a_comparison_is_right_and_needs_both_numbers():
    for example in examples("compare", 50, 1):
        nicknames, numbers = people_of(example), {}
        for words in sentences_of(example):
            if words[0].isdigit():
                nickname = next(word for word in words if word in NICKNAMES)
                numbers[nicknames[nickname]] = int(words[0])
        asked = [word for word in split_words(example.question.text) if word in NAMES]
        assert len(asked) == 2
        assert example.question.answer == max(asked, key=numbers.__getitem__)


def test_nothing_but_the_resolved_nickname_tells_whose_a_fact_is():
    """All people of a document have the same told of them, each once."""
    for example in examples("reference", 50, 1):
        asked = next(word for word in split_words(example.question.text) if word in NAMES)
        nicknames = people_of(example)
        nickname = next(nickname for nickname, name in nicknames.items() if name == asked)
        use = example.chunks[example.question.chunks[1]]
        assert re.search(rf"\b{example.question.answer}\b[^.]*\b{nickname}\.", use)
        kinds = {"car": r"The \w+ car was given to", "office": r"(\w+ is now home to|The office in \w+ belongs to)"}
        told = next(form for word, form in kinds.items() if f"{word} " in example.question.text)
        of = re.findall(told + r" (\w+)", " ".join(example.chunks))
        of = [match if isinstance(match, str) else match[-1] for match in of]
        assert sorted(of) == sorted(nicknames)


def test_examples_follow_from_their_seed():
    for kind in KINDS:
        assert examples(kind, 3, 8) == examples(kind, 3, 8)
        assert examples(kind, 3, 8) != examples(kind, 3, 9)


def test_the_bundled_tokenizer_knows_every_word_and_splits_as_the_corpus_does(demo):
    tokenizer = demo.tokenizer
    for example in examples("compare", 5, 0):
        for text in (*example.chunks, example.question.text, PREFIX):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.convert_ids_to_tokens(ids) == split_words(text)
            assert tokenizer.decode(ids) == text
