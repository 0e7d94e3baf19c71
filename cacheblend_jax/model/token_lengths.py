"""How many tokens a text has at least, by its length alone: what is far too long need not be encoded to be refused."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

NFC_SHRINKS = 4  # a text's UTF-8 takes at most so many times the bytes of its composed form
KEPT_BY_NFC = frozenset((*range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)))  # bytes of what it may compose
LOSSLESS = ("ByteLevel", "Digits", "Metaspace")  # pre-tokenizers that drop nothing


class TokenLengths(NamedTuple):
    """Of the UTF-8 of texts: how many bytes one token stands for at most, and the bytes that may have no token."""

    longest: int
    unknown: bytes

    def fewest(self, *texts: str) -> int:
        """Returns a number of tokens that the texts have at least, joined or apart."""
        return -(-sum(len(text.encode().translate(None, self.unknown)) for text in texts) // self.longest)


def token_lengths(tokenizer: Any) -> TokenLengths | None:
    """Returns what texts' lengths say of their tokens.

    `None` where that is unknown: of tokenizers that drop or join characters, or have one token for unknown words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    normalizers = _steps(backend.normalizer, "normalizers")
    shrinks = [_shrink(step) for step in normalizers]
    pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
    added = backend.get_added_tokens_decoder().values()
    unknown = _unknown_bytes(backend.model, any(step["type"] == "ByteLevel" for step in pre_tokenizers))
    if (
        unknown is None
        or 0 in shrinks
        or (NFC_SHRINKS in shrinks and not KEPT_BY_NFC.isdisjoint(unknown))
        or (unknown and any(step["type"] == "Replace" for step in normalizers))
        or not all(_is_lossless(step) for step in pre_tokenizers)
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    # A byte-level token has a letter for each byte, a letter has one byte or more, and this is a bound for both.
    longest = max(len(token.encode()) for token in backend.get_vocab(with_added_tokens=True))
    for shrink in shrinks:
        longest *= shrink
    return TokenLengths(longest, unknown)


def _steps(step: Any, members: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    state = json.loads(step.__getstate__())
    return state[members] if state["type"] == "Sequence" else [state]


def _shrink(normalizer: dict[str, Any]) -> int:
    """Returns by which factor a normalizer may shorten a text at most; 0 where that is unknown."""
    if normalizer["type"] == "NFC":
        return NFC_SHRINKS
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        return int(0 < len(pattern.encode()) <= len(normalizer["content"].encode()))
    return int(normalizer["type"] == "Prepend")


def _is_lossless(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Split":
        return pre_tokenizer["behavior"] != "Removed"
    return pre_tokenizer["type"] in LOSSLESS


def _unknown_bytes(model: Any, is_byte_level: bool) -> bytes | None:
    """Returns the bytes that have no token, which the model drops; `None` where it may drop or join others, too."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix or model.fuse_unk:
        return None
    if is_byte_level:
        return bytes(byte for byte, letter in bytes_to_unicode().items() if model.token_to_id(letter) is None)
    has_all = model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return b"" if has_all else None
