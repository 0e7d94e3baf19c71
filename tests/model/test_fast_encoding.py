"""Texts are encoded as transformers does it, but no thread waits for another's; how many tokens a text has at least."""

from __future__ import annotations

import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.model import encoding
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.model.fast_encoding import _copy, fast_copies
from cacheblend_jax.model.token_lengths import KEPT_BY_NFC, NFC_SHRINKS, token_lengths
from cacheblend_jax.serving import Bounds, ServingOptions, requests
from cacheblend_jax.serving.errors import TOO_LONG, ApiError

TEXT = "aaaa </s> bb[x]é 你<s>"
ALPHABET = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
VOCABULARY = ALPHABET | {"aa": 256, "aaaa": 257}


def byte_level(normalizer=None, *added: AddedToken, without: str = "", kind=PreTrainedTokenizerFast):
    vocabulary = {token: number for token, number in VOCABULARY.items() if token != without}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "aa")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizer
    for token in added or (AddedToken("[x]"),):
        backend.add_tokens([token])
    return kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_ids_are_those_of_transformers_whatever_other_threads_encode():
    tokenizer, wanted = byte_level(), {}
    for controls in (True, False):
        wanted[controls] = tokenizer.encode(TEXT * 9, add_special_tokens=False, split_special_tokens=not controls)
    wanted[False] = encode(byte_level(), TEXT * 9)  # nor is [x] a token of what users write
    assert wanted[True] != wanted[False]
    with ThreadPoolExecutor(4) as threads:
        asked = [number % 2 == 0 for number in range(200)]
        encoded = threads.map(lambda controls: encode(tokenizer, TEXT * 9, control_tokens=controls), asked)
        assert list(encoded) == [wanted[controls] for controls in asked]


def test_thousands_of_added_tokens_are_copied_together():
    """Each call looks at all that are there: one for each would take a minute."""
    calls = []

    class Counted:
        def __init__(self, model, tokenizer=None):
            self.__dict__["_tokenizer"] = tokenizer or Tokenizer(model)

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def __setattr__(self, name, value):
            setattr(self._tokenizer, name, value)

        def add_tokens(self, tokens):
            calls.append(len(tokens))
            return self._tokenizer.add_tokens(tokens)

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(f"<unused{number}>", special=number % 1000 == 0) for number in range(6000)])
    backend = tokenizer.backend_tokenizer
    copy = _copy(Counted(None, backend), False)
    assert sum(calls) > 5000
    assert len(calls) < 20
    assert copy.encode("<unused7>a</s>").ids == backend.encode("<unused7>a</s>").ids


def test_half_a_character_is_refused_before_its_length_is_looked_at():
    reader = requests.RequestReader(ServingOptions(), byte_level(), BlendConfig(), max_positions=10)
    with pytest.raises(ApiError, match="half of a surrogate pair"):
        reader.completion({"prompt": "a\udfff"}, "ada")


def test_no_text_waits_for_another(monkeypatch):
    monkeypatch.setattr(encoding, "_encoding_lock", lock := threading.Lock())
    with lock, ThreadPoolExecutor(1) as thread:
        assert thread.submit(encode, byte_level(), "aaaa").result(60) == [257]


def test_a_class_that_encodes_in_its_own_way_does_so():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return {"input_ids": [7]}

    assert fast_copies(byte_level(kind=Own)) is None
    assert encode(byte_level(kind=Own), "aaaa") == [7]


@given(
    st.text(
        st.sampled_from("a [x]\x04\u00e9\u0301\u03b1\u0313\u0300\u0345\uac01\u1100\u1161\u11a8\u4f60\n"), max_size=40
    )
)
def test_a_text_has_as_many_tokens_as_its_length_says(text):
    for tokenizer in (byte_level(), byte_level(normalizers.NFC()), byte_level(normalizers.Replace(" ", "__"))):
        assert len(encode(tokenizer, text)) >= token_lengths(tokenizer).fewest(text)


def test_bytes_without_a_token_do_not_count():
    tokenizer = byte_level(without="\u0104")  # of the byte 4
    assert encode(tokenizer, "\x04" * 99) == []
    assert token_lengths(tokenizer).fewest("\x04" * 99 + "b" * 5) == 2
    assert token_lengths(byte_level(normalizers.NFC(), without="\u0104")) is not None
    assert token_lengths(byte_level(normalizers.NFC(), without="e")) is None  # beside an accent, another byte


def test_no_text_has_more_than_four_times_the_bytes_of_its_composed_form():
    letters = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x30000))]
    longest: dict[str, int] = {}  # of the letters that decompose to one other, and of that
    for letter in letters:
        if len(apart := unicodedata.normalize("NFD", letter)) == 1:
            longest[apart] = max(longest.get(apart, 0), len(letter.encode()))
    composed = [letter for letter in letters if unicodedata.is_normalized("NFC", letter)]
    bytes_before = [sum(longest[part] for part in unicodedata.normalize("NFD", letter)) for letter in composed]
    shrinks = [before / len(letter.encode()) for before, letter in zip(bytes_before, composed, strict=True)]
    assert 3 < max(shrinks) <= NFC_SHRINKS
    apart = [letter for letter in composed if unicodedata.normalize("NFD", letter) != letter]
    assert {byte for letter in apart for byte in letter.encode()} <= KEPT_BY_NFC


def test_where_characters_may_be_lost_nothing_is_said_of_a_texts_length():
    assert token_lengths(byte_level()).longest == len("aaaa")
    for lossy in (
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])),
        byte_level(None, AddedToken("[x]", lstrip=True)),
        byte_level(None, AddedToken("[x]", rstrip=True, special=True)),  # which templates print
        byte_level(normalizers.Replace(" ", "\x04"), without="\u0104"),
    ):
        assert token_lengths(lossy) is None
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert token_lengths(PreTrainedTokenizerFast(tokenizer_object=words)) is None
    pairs = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))  # which drops all other characters
    assert token_lengths(PreTrainedTokenizerFast(tokenizer_object=pairs)) is None
    pieces = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    assert token_lengths(PreTrainedTokenizerFast(tokenizer_object=pieces)).longest == len("<0x00>")


@pytest.mark.parametrize(
    ("read", "body"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a" * 41}]}),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "documents": ["a" * 20, "a" * 20]}),
        ("completion", {"prompt": "a" * 41}),
        ("completion", {"prompt": [1], "documents": ["a" * 41]}),
        ("chunks", {"chunks": ["a", "a" * 41]}),
    ],
)
def test_what_is_too_long_by_its_length_is_refused_unread(monkeypatch, read, body):
    for name in ("encode", "encode_opened", "prompt_of", "KnownTexts"):
        monkeypatch.setattr(requests, name, lambda *_, **__: None)
    reader = requests.RequestReader(ServingOptions(), byte_level(), BlendConfig(), max_positions=10)
    with pytest.raises(ApiError, match="has at least 11 tokens by its length alone, of at most 10") as refused:
        getattr(reader, read)(body, "ada")
    assert refused.value.code == TOO_LONG
    bounds = Bounds(prompt_tokens=9)
    reader = requests.RequestReader(ServingOptions(bounds=bounds), byte_level(), BlendConfig(), max_positions=10)
    with pytest.raises(ApiError, match="of at most 9"):
        reader.chat({"messages": [{"role": "user", "content": "a" * 37}]}, "ada")
