"""Text from tokens as they come: the whole text's pieces, at a cost that does not grow with the answer."""

from __future__ import annotations

import json
import shutil
import string

import numpy as np
import pytest
from conftest import HF
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import cacheblend_jax as cb
from cacheblend_jax.engine.growing_text import INCOMPLETE, LIMIT, OVERLAP, WINDOW, GrowingText
from cacheblend_jax.model.checkpoint import load_tokenizer

TEXT = "Die Straße führt über 北京 nach 東京 🚂🌍, it's said .  Two  spaces, <0x41> a\n\nnew line; naïve café. " * 3


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: spaces are letters, the text's first one is dropped."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, ".", ","]
    core = Tokenizer(
        models.BPE(dict(zip(letters, range(400), strict=False)), [], byte_fallback=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module", params=["demo", "llama3", "bytes"])
def tokenizer(request):
    if request.param == "bytes":
        return with_byte_fallback()
    return cb.load_model("demo" if request.param == "demo" else HF / request.param).tokenizer


def by_decoding_everything(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds, from the text of all tokens up to it, which may lose whole characters to a half one."""
    pieces, text = [], ""
    for count in range(1, len(ids) + 1):
        grown = tokenizer.decode(ids[:count], skip_special_tokens=True).rstrip("\ufffd")
        pieces.append(grown[len(text) :])
        text = max(text, grown, key=len)
    return pieces


def test_pieces_are_those_that_decoding_everything_gives(tokenizer):
    ids = tokenizer.encode(TEXT)
    growing = GrowingText(tokenizer)
    assert [growing.add(token) for token in ids] == by_decoding_everything(tokenizer, ids)
    assert growing.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_tokens_that_make_no_sense_are_the_same(tokenizer, seed):
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 120).tolist()
    growing = GrowingText(tokenizer)
    assert [growing.add(token) for token in ids] == by_decoding_everything(tokenizer, ids)


def test_no_spaces_are_taken_out_of_a_text_whatever_the_tokenizers_configuration_says(tmp_path):
    shutil.copytree(HF / "llama3", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    tokenizer, text = load_tokenizer(tmp_path / "model"), "x = 'set' if y else 'more' ."
    assert tokenizer.clean_up_tokenization_spaces is False  # what transformers before 5.7 goes by
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


class Bytes:
    """A tokenizer whose tokens are bytes; counts those that it has decoded."""

    decoded = 0

    def decode(self, ids, skip_special_tokens):
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain " * 200, "北京🚂" * 100, "🚂" * 200])
def test_the_work_grows_as_the_text_does(text):
    tokenizer = Bytes()
    growing = GrowingText(tokenizer)
    for token in text.encode():
        growing.add(token)
    assert growing.text == text
    assert tokenizer.decoded <= len(text.encode()) * (WINDOW + 4 + OVERLAP)


def test_tokens_that_are_no_text_and_bytes_that_are_no_characters_cost_no_more(tokenizer, monkeypatch):
    decode, word = tokenizer.decode, tokenizer.encode("Oslo", add_special_tokens=False)
    strays = [token for token in range(len(tokenizer)) if decode([token]) == INCOMPLETE]
    for without in (*tokenizer.all_special_ids[:1], *strays[:1]):
        ids, decoded, growing = [without] * 300 + word, [], GrowingText(tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(
                tokenizer, "decode", lambda ids, to=decoded, **how: (to.append(len(ids)), decode(ids, **how))[1]
            )
            for token in ids:
                growing.add(token)
        assert growing.text == decode(ids, skip_special_tokens=True)
        assert sum(decoded) < len(ids) * LIMIT


def test_a_model_without_a_tokenizer_has_no_text():
    growing = GrowingText(None)
    assert growing.add(5) == growing.text == ""
