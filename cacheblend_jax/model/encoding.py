"""From text to token ids: what users write stays text, whatever control tokens it spells out.

A control token is one that steers a model: a special token (`</s>`), or an added one that reads like markup
(`<think>`). Added words, and runs of white space, are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from cacheblend_jax.errors import PromptError
from cacheblend_jax.model.fast_encoding import FastCopies, fast_copies

# For tokenizers of which there are no copies: how they treat special tokens may be state that each call sets.
_encoding_lock = threading.Lock()
_knowing = threading.Lock()  # one thread finds out about a tokenizer


class _Known(NamedTuple):
    """What is known of a tokenizer in this state: its other parts are not to be changed once it has been used."""

    state: tuple[int, bool]  # the size of its vocabulary, and whether special tokens are in pieces by default
    controls: frozenset[int]
    copies: FastCopies | None


_known_tokenizers: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
MARKUP = re.compile(r"[<>\[\]{}|｜]")
PROBE = "a"
BATCH = 256  # texts whose ids are in memory at a time while they are counted


def encode(tokenizer: Any, text: str, *, control_tokens: bool = False) -> list[int]:
    """Returns a text's ids, without the tokenizer's opening (BOS). Safe to use from several threads.

    Args:
        control_tokens: control tokens that the text spells out become tokens; otherwise they stay text.

    Raises:
        PromptError: it isn't text, or not valid Unicode.
    """
    check_text(text)
    known = _known_of(tokenizer)
    if known.copies is not None:
        ids = known.copies.encode(text, control_tokens=control_tokens)
    else:
        splitting = {} if control_tokens else {"split_special_tokens": True}
        with _encoding_lock:
            ids = list(tokenizer.encode(text, add_special_tokens=False, **splitting))
    # In pieces are special tokens by now, but no added ones.
    return ids if control_tokens else _without_controls(tokenizer, text, ids, known.controls)


def count_all(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Returns how many ids `encode` gives each text, encoding many at a time where the tokenizer does so faster.

    Raises:
        PromptError: as `encode`.
    """
    for text in texts:
        check_text(text)
    counts: list[int] = []
    for first in range(0, len(texts), BATCH):
        batch = list(texts[first : first + BATCH])
        encoded = zip(batch, _encoded(tokenizer, batch), strict=True)
        controls = _known_of(tokenizer).controls
        counts += [len(_without_controls(tokenizer, text, ids, controls)) for text, ids in encoded]
    return counts


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if (copies := _known_of(tokenizer).copies) is not None:
        return copies.encode_all(texts)
    with _encoding_lock:
        return [list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) for text in texts]


def is_read_as_text(tokenizer: Any, number: int, token: Any) -> bool:
    """Returns whether `encode` leaves an added token (transformers' `AddedToken`), by its id, in pieces."""
    return token.special or number in _known_of(tokenizer).controls


def tokenizer_bytes(tokenizer: Any) -> bytes:
    """Returns what a text's ids depend on, and the vocabulary by itself, as bytes: none without a tokenizer."""
    if tokenizer is None:
        return b""
    return _vocabulary(tokenizer) + _steps(tokenizer)


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns the SHA-256 (hex) over what a text's ids depend on."""
    return hashlib.sha256(_steps(tokenizer) or _vocabulary(tokenizer)).hexdigest()


def _vocabulary(tokenizer: Any) -> bytes:
    return json.dumps(sorted(tokenizer.get_vocab().items())).encode()


def _steps(tokenizer: Any) -> bytes:
    """Returns a fast tokenizer's steps, its vocabulary among them; nothing for another one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return b""
    if backend.truncation or backend.padding:  # left behind by an earlier call: a text's ids don't depend on them
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str().encode()


def opening(tokenizer: Any) -> list[int]:
    """Returns what the tokenizer puts before a text: BOS, mostly."""
    with _encoding_lock:
        bare = list(tokenizer.encode(PROBE, add_special_tokens=False))
        framed = list(tokenizer.encode(PROBE, add_special_tokens=True))
    starts = range(len(framed) - len(bare) + 1)
    return framed[: next((start for start in starts if framed[start : start + len(bare)] == bare), 0)]


def encode_opened(tokenizer: Any, text: str, *, control_tokens: bool = False) -> list[int]:
    """Returns a prompt's first ids: the tokenizer's opening, unless the text spells it out itself, and the text."""
    check_text(text)
    start = opening(tokenizer)
    spelled = "".join(tokenizer.convert_ids_to_tokens(start)) if start else ""
    return start + encode(tokenizer, text.removeprefix(spelled), control_tokens=control_tokens)


def check_text(text: object, name: str = "text") -> None:
    """Raises `PromptError` where `text` isn't text that UTF-8 can encode."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} must be valid Unicode, got half of a surrogate pair at character {error.start}; "
            f"was it read from bytes that are not UTF-8?"
        ) from None


def _without_controls(tokenizer: Any, text: str, ids: list[int], controls: frozenset[int]) -> list[int]:
    return ids if controls.isdisjoint(ids) else _in_pieces(tokenizer, text, controls) or ids


def _known_of(tokenizer: Any) -> _Known:
    if not hasattr(type(tokenizer), "added_tokens_decoder"):  # of the tokenizer itself, it would be built each time
        return _Known((0, False), frozenset(), None)
    state = len(tokenizer), bool(getattr(tokenizer, "split_special_tokens", False))
    known = _known_tokenizers.get(tokenizer)
    if known is not None and known.state == state:
        return known
    with _knowing:
        known = _known_tokenizers.get(tokenizer)
        if known is None or known.state != state:
            controls = (
                token_id
                for token_id, token in tokenizer.added_tokens_decoder.items()
                if (token.special or MARKUP.search(token.content)) and token_id != tokenizer.unk_token_id
            )
            known = _known_tokenizers[tokenizer] = _Known(state, frozenset(controls), fast_copies(tokenizer))
        return known


def _in_pieces(tokenizer: Any, text: str, controls: Collection[int]) -> list[int] | None:
    """Runs the tokenizer's steps one by one, without its added tokens; `None` if it doesn't have steps."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    words = [normalized]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]
    return [token_id for word in words for token_id in _word_ids(backend.model, word, controls)]


def _word_ids(model: Any, word: str, controls: Collection[int]) -> list[int]:
    """Returns a word's ids; where the model itself knows a control token, the word is cut within it."""
    tokens = model.tokenize(word)
    control = next((token.value for token in tokens if token.id in controls), None)
    if control is None or len(word) == 1:
        return [token.id for token in tokens]
    cut = min(max(word.find(control), 0) + 1, len(word) - 1)
    return _word_ids(model, word[:cut], controls) + _word_ids(model, word[cut:], controls)
