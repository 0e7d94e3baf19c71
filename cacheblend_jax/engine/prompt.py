"""Prompts in parts that are tokenised separately: prefix, reusable chunks, suffix; also from chat templates."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheblend_jax.errors import PromptError, PromptTooLongError

TextOrIds = str | Sequence[int] | np.ndarray

# A fast tokenizer encodes without holding the GIL, and how it treats special tokens is state that each call sets.
_encoding_lock = threading.Lock()
SYSTEM = "Answer the question from the passages."


@dataclass(frozen=True)
class Prompt:
    """A RAG prompt: `prefix` (system prompt), `chunks` (retrieved texts, reused), `suffix` (question).

    Each part is text or token ids. Parts are tokenised separately and their ids concatenated, so that a chunk's ids
    never depend on its neighbours. A text prefix, even an empty one, gets the tokenizer's own opening (BOS); token ids
    are taken as they are, so `prefix=[]` is no prefix at all. Special tokens spelled out in chunk text stay plain
    text; in prefix and suffix they are recognised, since chat templates write them there.
    """

    prefix: TextOrIds = ""
    chunks: Sequence[TextOrIds] = ()
    suffix: TextOrIds = ""

    def __post_init__(self) -> None:
        if isinstance(self.chunks, str | bytes):
            raise PromptError("chunks must be a sequence of chunks, got one string; write chunks=[text]")

    @classmethod
    def to_answer(
        cls, tokenizer: Any, chunks: Sequence[str], question: str, *, system: str | None = None, separator: str = "\n\n"
    ) -> Prompt:
        """Builds the prompt that asks `question` about `chunks`: from the tokenizer's chat template, if it has one.

        `system` is the text before the chunks; `None`: the tokenizer's own (`system_text`), or a general one.
        """
        if system is None:
            system = getattr(tokenizer, "init_kwargs", {}).get("system_text") or SYSTEM
        if getattr(tokenizer, "chat_template", None):
            return cls.from_chat_template(
                tokenizer, system=system, chunks=chunks, question=question, separator=separator
            )
        suffix = f"Question: {question}\nAnswer:"
        return cls(system + separator, [chunk + separator for chunk in chunks], suffix)

    @classmethod
    def from_chat_template(
        cls,
        tokenizer: Any,
        *,
        chunks: Sequence[str],
        question: str,
        system: str | None = None,
        separator: str = "\n\n",
    ) -> Prompt:
        """Builds the prompt of one chat turn: a system message, then a user message of the chunks and the question.

        The template is rendered once around a placeholder and split there. The text before it is the prefix; the
        text after it follows the question in the suffix. `separator` follows each chunk. If the template refuses system
        messages, the system text begins the user's message.

        Raises:
            PromptError: the tokenizer has no chat template, or the template does not print the user's message once.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError("the tokenizer has no chat template; build Prompt(prefix=…, chunks=…, suffix=…) instead")
        before, after = _render_around_placeholder(tokenizer, system)

        return cls(
            prefix=encode(tokenizer, before),
            chunks=[encode(tokenizer, chunk + separator, plain=True) for chunk in chunks],
            suffix=encode(tokenizer, question, plain=True) + encode(tokenizer, after),
        )


def _render_around_placeholder(tokenizer: Any, system: str | None) -> tuple[str, str]:
    placeholder = "[[cacheblend:user message]]"

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    user = {"role": "user", "content": placeholder}
    if system is None:
        rendered = render([user])
    else:
        try:
            rendered = render([{"role": "system", "content": system}, user])
            refused = system.strip() not in rendered
        except Exception:  # templates raise whatever they like to refuse a role
            refused = True
        if refused:
            rendered = render([{"role": "user", "content": f"{system}\n\n{placeholder}"}])
    if rendered.count(placeholder) != 1:
        raise PromptError("the tokenizer's chat template does not print the user's message exactly once")
    before, _, after = rendered.partition(placeholder)
    return before, after


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's parts as int32 token ids, checked against the model."""

    prefix: np.ndarray
    chunks: tuple[np.ndarray, ...]
    suffix: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """All ids, int32 `[tokens]`."""
        return np.concatenate([self.prefix, *self.chunks, self.suffix])


def tokenize_prompt(prompt: Prompt, tokenizer: Any, *, vocab_size: int, max_tokens: int) -> TokenizedPrompt:
    """Tokenises each part on its own and checks the whole.

    Raises:
        PromptError: the prompt is empty or longer than `max_tokens`, a chunk has no tokens, an id is not in the
            vocabulary, or a part is text without a tokenizer. The message names the part.
    """
    tokenized = tokenize_parts(prompt, tokenizer, vocab_size)
    total = tokenized.token_ids.size
    if total == 0:
        raise PromptError("the prompt is empty: prefix, chunks and suffix have no tokens; give at least one token")
    check_length(total, max_tokens)
    return tokenized


def tokenize_parts(prompt: Prompt, tokenizer: Any, vocab_size: int) -> TokenizedPrompt:
    """Tokenises each part on its own and checks its ids, whatever the length of the whole."""
    return TokenizedPrompt(
        prefix=_tokenize_prefix(prompt.prefix, tokenizer, vocab_size),
        chunks=tuple(
            _tokenize_chunk(chunk, f"chunk {i}", tokenizer, vocab_size) for i, chunk in enumerate(prompt.chunks)
        ),
        suffix=_token_ids(prompt.suffix, "suffix", tokenizer, vocab_size),
    )


def check_length(total: int, max_tokens: int, what: str = "the prompt") -> None:
    """Raises `PromptTooLongError` where `total` tokens are more than the model takes."""
    if total > max_tokens:
        raise PromptTooLongError(
            f"{what} has {total} tokens, but the model takes at most {max_tokens}; use fewer or shorter chunks"
        )


def _tokenize_prefix(prefix: TextOrIds, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Returns a prefix's ids; text gets the tokenizer's opening special tokens (BOS)."""
    if not isinstance(prefix, str) or (prefix == "" and tokenizer is None):
        return _token_ids(prefix, "prefix", tokenizer, vocab_size)
    _require_tokenizer(tokenizer, "prefix")
    ids = encode(tokenizer, prefix, opening=True)
    plain = encode(tokenizer, prefix)
    # Some tokenizers also append EOS, but the prompt goes on after its prefix.
    while ids and ids[-1] == tokenizer.eos_token_id and (not plain or plain[-1] != tokenizer.eos_token_id):
        ids.pop()
    return checked_ids(ids, "prefix", vocab_size)


def _tokenize_chunk(chunk: TextOrIds, name: str, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Returns a chunk's ids; special tokens in its text stay text."""
    if isinstance(chunk, str):
        _require_tokenizer(tokenizer, name)
        ids = checked_ids(encode(tokenizer, chunk, plain=True), name, vocab_size)
    else:
        ids = checked_ids(chunk, name, vocab_size)
    if ids.size == 0:
        raise PromptError(f"{name} has no tokens; leave it out")
    return ids


def _token_ids(part: TextOrIds, name: str, tokenizer: Any, vocab_size: int) -> np.ndarray:
    if isinstance(part, str):
        if part == "":
            return np.zeros(0, np.int32)
        _require_tokenizer(tokenizer, name)
        return checked_ids(encode(tokenizer, part), name, vocab_size)
    return checked_ids(part, name, vocab_size)


def encode(tokenizer: Any, text: str, *, plain: bool = False, opening: bool = False) -> list[int]:
    """Returns a text's ids. `plain`: special tokens spelled out in it stay text; `opening`: BOS and the like are added.

    Safe to use from several threads.
    """
    as_text = {"split_special_tokens": True} if plain else {}
    with _encoding_lock:
        return list(tokenizer.encode(text, add_special_tokens=opening, **as_text))


def _require_tokenizer(tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        raise PromptError(f"{name} is text, but the model has no tokenizer; give token ids")


def checked_ids(ids: Sequence[int] | np.ndarray, name: str, vocab_size: int) -> np.ndarray:
    """Returns token ids as int32; `name` stands in errors.

    Raises:
        PromptError: not a flat sequence of whole numbers in the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise PromptError(f"{name} must be text or a flat sequence of token ids: {error}") from error
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise PromptError(f"{name} must be text or a flat sequence of token ids, got {array.dtype}{list(array.shape)}")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise PromptError(f"{name} has token id {wrong}, which is not in the vocabulary [0, {vocab_size - 1}]")
    return array.astype(np.int32)
