"""Splitting texts: at which borders, by how many tokens, and what is remembered of it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cacheblend_jax as cb
from cacheblend_jax.documents import Chunk, Document, DocumentError, chunk_documents, remembered_cuts, split_into_chunks
from cacheblend_jax.documents import chunking as chunking_module
from cacheblend_jax.documents import splitting as splitting_module
from cacheblend_jax.documents.splitting import cut
from cacheblend_jax.errors import PromptError
from cacheblend_jax.model import encoding as encoding_module
from cacheblend_jax.model.encoding import count_all, encode

PROSE = (files("cacheblend_jax.engine") / "neutral_text.txt").read_text(encoding="utf-8")
MARKDOWN = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def words(text: str) -> int:
    return len(text.split())


def test_splits_at_paragraph_borders():
    text = "one two three\n\nfour five\n\nsix seven eight nine\n\nten"
    assert split_into_chunks(text, 5, words) == ["one two three\n\nfour five", "six seven eight nine\n\nten"]


def test_a_heading_stays_with_its_paragraph():
    text = "one two three four\n\n# Heading\n\nfive six"
    assert split_into_chunks(text, 5, words) == ["one two three four", "# Heading\n\nfive six"]


def test_a_long_paragraph_is_split_at_sentences_then_words_then_characters():
    assert split_into_chunks("One two. Three four. Five six.", 4, words) == ["One two. Three four.", "Five six."]
    assert split_into_chunks("a b c d e", 2, words) == ["a b", "c d", "e"]
    assert split_into_chunks("abcdefgh", 3, len) == ["abc", "def", "gh"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .\n#é"), max_size=200), st.integers(4, 40))
def test_chunks_fit_and_lose_nothing_but_white_space(text, chunk_tokens):
    chunks = split_into_chunks(text, chunk_tokens, lambda part: len(part.encode()))
    assert all(0 < len(chunk.encode()) <= chunk_tokens for chunk in chunks)
    assert all(chunk in text for chunk in chunks)
    assert "".join("".join(chunks).split()) == "".join(text.split())


@pytest.mark.parametrize("size", [0, -3, True, 2.5])
def test_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(DocumentError, match="at least 1"):
        split_into_chunks("text", size, words)


def test_a_character_larger_than_a_chunk_is_an_error():
    with pytest.raises(DocumentError, match="raise chunk_tokens"):
        split_into_chunks("é", 1, lambda text: len(text.encode()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that merges, also over line breaks, with a token that steers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [PROSE, MARKDOWN], trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_chunks_never_mix_documents(tokenizer):
    chunks = chunk_documents([Document("a", "x y"), Document("b", "z\n\nw")], tokenizer, 2, separator=" ")
    assert chunks == [Chunk("x", "a", 0), Chunk("y", "a", 1), Chunk("z", "b", 0), Chunk("w", "b", 1)]


@pytest.mark.parametrize("chunk_tokens", [40, 300])
@pytest.mark.parametrize("text", [PROSE, MARKDOWN, MARKDOWN.replace("\n\n", " "), "a </s> <think> " * 60], ids="pmlc")
def test_a_chunk_with_its_separator_has_as_many_tokens_as_asked_at_most(tokenizer, text, chunk_tokens):
    chunks = cb.split_text(text, tokenizer, chunk_tokens)
    lengths = [len(encode(tokenizer, chunk + "\n\n")) for chunk in chunks]
    assert max(lengths) <= chunk_tokens
    assert "".join("".join(chunks).split()) == "".join(text.split())
    # The next paragraph, sentence or word would not have fitted, mostly.
    assert sum(lengths) > 0.6 * chunk_tokens * (len(lengths) - 1)


@pytest.mark.parametrize(("chunk_tokens", "times"), [(40, 5), (300, 3)])
@pytest.mark.parametrize("text", [PROSE, MARKDOWN], ids="pm")
def test_what_hardly_fits_is_not_counted_and_changes_no_cut(tokenizer, text, chunk_tokens, times, monkeypatch):
    characters = 0

    def counts(texts: list[str]) -> list[int]:
        nonlocal characters
        characters += sum(map(len, texts))
        return count_all(tokenizer, [each + "\n\n" for each in texts])

    cuts = cut(text, chunk_tokens, counts)
    # Once in pieces, once in chunks, and now and then a chunk too long; pieces of pieces where chunks are short.
    assert characters < times * len(text)
    sparing, characters = characters, 0
    monkeypatch.setattr(splitting_module, "BORDER_TOKENS", 10**6)
    assert cut(text, chunk_tokens, counts) == cuts
    assert characters > sparing


def test_all_pieces_are_encoded_in_few_calls(tokenizer, monkeypatch):
    calls = []
    encoded = encoding_module._encoded
    monkeypatch.setattr(encoding_module, "_encoded", lambda *each: calls.append(len(each[1])) or encoded(*each))
    chunks = cb.split_text("\n\n".join(f"Paragraph {number}." for number in range(1000)), tokenizer, 100)
    assert calls[:4] == [256, 256, 256, 232]
    assert len(calls) < 4 + 2.5 * len(chunks)


def test_counts_are_those_of_encode(tokenizer):
    texts = ["", "a", PROSE, "</s>", "x<think>y</s>", "\u00e9" * 9]
    assert count_all(tokenizer, texts) == [len(encode(tokenizer, text)) for text in texts]
    assert count_all(Slow(), texts) == [len(text) for text in texts]
    with pytest.raises(PromptError, match="surrogate"):
        count_all(tokenizer, ["a", "\ud800"])


class Slow:
    """A tokenizer that takes one text at a time."""

    def encode(self, text: str, **options: bool) -> list[int]:
        return [ord(character) for character in text]


def test_how_many_added_tokens_there_are_costs_nothing_for_each_text(tokenizer, monkeypatch):
    built = 0
    decoder = type(tokenizer).added_tokens_decoder

    def added_tokens_decoder(self) -> dict:
        nonlocal built
        built += 1
        return decoder.fget(self)

    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", property(added_tokens_decoder))
    for _ in range(5):
        encode(tokenizer, "text")
    assert built <= 1


def test_no_tokenizer_is_an_error():
    with pytest.raises(DocumentError, match="tokenizer is None"):
        cb.split_text("text", None)


@pytest.fixture
def remembering(monkeypatch, own_user_cache) -> Path:
    """Has splits remembered whatever their length; returns where."""
    monkeypatch.setattr(chunking_module, "REMEMBERED_CHARACTERS", 1)
    return own_user_cache / "splits"


@pytest.fixture
def cuts_made(monkeypatch) -> list[str]:
    """The texts that were cut, not remembered."""
    made = []
    monkeypatch.setattr(chunking_module, "cut", lambda text, *rest, **how: made.append(text) or cut(text, *rest, **how))
    return made


def test_a_split_is_remembered_for_its_text_tokenizer_and_parameters(tokenizer, remembering, cuts_made):
    chunks = cb.split_text(PROSE, tokenizer, 100)
    assert cb.split_text(PROSE, tokenizer, 100) == chunks
    assert cuts_made == [PROSE]
    assert len(cb.split_text(PROSE, tokenizer, 50)) > len(chunks)
    cb.split_text(PROSE, tokenizer, 100, separator="")
    cb.split_text(PROSE + "!", tokenizer, 100)
    assert len(cuts_made) == 4
    before = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    cb.split_text(PROSE, tokenizer, 100)
    tokenizer.backend_tokenizer.pre_tokenizer = before
    assert len(cuts_made) == 5
    cb.split_text(PROSE, tokenizer, 100)
    assert len(cuts_made) == 5
    documents = [Document("a", PROSE), Document("b", PROSE + "?")]
    assert chunk_documents(documents, tokenizer, 100)[: len(chunks)] == [
        Chunk(text, "a", number) for number, text in enumerate(chunks)
    ]
    assert len(cuts_made) == 6


def test_short_texts_are_not_remembered(tokenizer, own_user_cache):
    cb.split_text(PROSE, tokenizer, 100)
    assert not (own_user_cache / "splits").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: text.replace(", 1", ", 2", 1),
        lambda text: json.dumps({"cuts": {}, "sha256": 3}),
    ],
    ids=["empty", "cut", "other", "changed", "hollow"],
)
def test_a_damaged_record_is_made_anew(tokenizer, remembering, cuts_made, damage):
    chunks = cb.split_text(PROSE, tokenizer, 100)
    (record,) = remembering.iterdir()
    good = record.read_text()
    assert damage(good) != good
    record.write_text(damage(good))
    assert cb.split_text(PROSE, tokenizer, 100) == chunks
    assert len(cuts_made) == 2
    assert record.read_text() == good


def test_what_is_remembered_is_bounded(tokenizer, remembering, cuts_made, monkeypatch):
    monkeypatch.setattr(remembered_cuts, "MOST_CUTS", 8)
    monkeypatch.setattr(remembered_cuts, "MOST_RECORDS", 3)
    for number in range(6):  # one chunk each, two cuts
        cb.split_text(f"text {number}", tokenizer)
    chunk_documents([Document("", "text 2"), Document("", "text 6")], tokenizer)  # text 3 is the least recent now
    cb.split_text("text 2", tokenizer)
    assert cuts_made == [f"text {number}" for number in range(7)]
    cb.split_text("text 3", tokenizer)
    assert len(cuts_made) == 8
    for chunk_tokens in range(100, 105):
        cb.split_text("text", tokenizer, chunk_tokens)
    assert len(list(remembering.iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_the_split_alone(tokenizer, remembering):
    remembering.parent.mkdir(exist_ok=True)
    remembering.write_text("a file")
    assert cb.split_text("text", tokenizer) == ["text"]
