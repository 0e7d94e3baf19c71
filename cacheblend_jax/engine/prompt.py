"""Prompts in parts that are tokenised separately: prefix, reusable chunks, suffix; also from chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cacheblend_jax.engine.chat_template import encode_around_message, encode_around_next_message
from cacheblend_jax.errors import PromptError, PromptTooLongError
from cacheblend_jax.model.encoding import check_text, encode, encode_opened

TextOrIds = str | Sequence[int] | np.ndarray
Encoder = Callable[..., list[int]]
SYSTEM = "Answer the question from the passages."
PLAIN_QUESTION = "Question: {}\nAnswer:"  # without a chat template


@dataclass(frozen=True, eq=False)
class Prompt:
    """A RAG prompt: `prefix` (system prompt), `chunks` (retrieved texts, reused), `suffix` (question).

    Each part is text or token ids. Parts are tokenised separately and their ids concatenated, so that a chunk's ids
    never depend on its neighbours. A text prefix, even an empty one, gets the tokenizer's own opening (BOS), unless it
    begins with it; token ids are taken as they are, so `prefix=[]` is no prefix at all.

    Text is text: control tokens that it spells out (`</s>`, `<think>`) don't become tokens. Where prefix and suffix
    are what a chat template has printed, say so: `control_tokens=True`. In chunks they are never tokens.

    `tenant` says whose the prompt is: prompts of different tenants find, use and make different entries of the store.

    `chunks` may be any iterable with an order; it is read once, and kept as a tuple. Prompts are equal where their
    texts and token ids are.
    """

    prefix: TextOrIds = ""
    chunks: Sequence[TextOrIds] = ()
    suffix: TextOrIds = ""
    control_tokens: bool = False
    tenant: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", _ordered(self.chunks))
        if not isinstance(self.control_tokens, bool):
            raise PromptError(f"control_tokens must be True or False, got {self.control_tokens!r}")
        check_text(self.tenant, "tenant")

    def __eq__(self, other: object) -> bool:
        return self._comparable() == other._comparable() if isinstance(other, Prompt) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._comparable())

    def _comparable(self) -> tuple[object, ...]:
        parts = (self.prefix, *self.chunks, self.suffix)
        return (
            self.control_tokens,
            self.tenant,
            *(part if isinstance(part, str) else _plain_ids(part) for part in parts),
        )

    @classmethod
    def to_answer(
        cls,
        tokenizer: Any,
        chunks: Iterable[str],
        question: str,
        *,
        system: str | None = None,
        separator: str = "\n\n",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Builds the prompt that asks `question` about `chunks`: from the tokenizer's chat template, if it has one.

        `system` is the text before the chunks; `None`: the tokenizer's own (`system_text`), or a general one.
        `template_arguments` are for the chat template (see `from_chat_template`).

        Raises:
            PromptError: something isn't text, or arguments are given for a template that isn't there.
        """
        if system is None:
            system = default_system(tokenizer)
        if getattr(tokenizer, "chat_template", None):
            return cls.from_chat_template(
                tokenizer,
                system=system,
                chunks=chunks,
                question=question,
                separator=separator,
                template_arguments=template_arguments,
            )
        if template_arguments:
            raise PromptError(
                "template_arguments need a chat template, which the tokenizer does not have; leave them out"
            )
        texts = _checked_texts(chunks, question, system, separator)
        return cls(system + separator, [text + separator for text in texts], PLAIN_QUESTION.format(question))

    @staticmethod
    def follow_up(tokenizer: Any, question: str, *, template_arguments: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the ids of a conversation's next turn, for `Engine.extend`, after a prompt of `to_answer`.

        They begin with what ends the answer before it, and end with what opens the next.

        Raises:
            PromptError: the question isn't text, or the chat template has no room for another turn.
        """
        check_text(question, "the question")
        if getattr(tokenizer, "chat_template", None):
            before, after = encode_around_next_message(tokenizer, template_arguments or {})
            return before + encode(tokenizer, question) + after
        return encode(tokenizer, "\n\n" + PLAIN_QUESTION.format(question))

    @classmethod
    def from_chat_template(
        cls,
        tokenizer: Any,
        *,
        chunks: Iterable[str],
        question: str,
        system: str | None = None,
        separator: str = "\n\n",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Builds the prompt of one chat turn: a system message, then a user message of the chunks and the question.

        The template is rendered once around a placeholder and split there. The text before it is the prefix; the
        text after it follows the question in the suffix. `separator` follows each chunk. If the template refuses system
        messages, the system text begins the user's message. Control tokens come from the template alone: those that
        system text, chunks or question spell out are text.

        Args:
            template_arguments: what the template takes beside the messages, `{"enable_thinking": False}` say;
                `"chat_template"` names one of several templates.

        Raises:
            PromptError: the tokenizer has no chat template, or several without a default; it fails, or does not print
                the user's message once; something isn't text.
        """
        texts = _checked_texts(chunks, question, system, separator)
        before, after = encode_around_message(tokenizer, system, template_arguments or {})
        return cls(
            prefix=before,
            chunks=[encode(tokenizer, text + separator) for text in texts],
            suffix=encode(tokenizer, question) + after,
        )


def default_system(tokenizer: Any) -> str:
    """Returns the text before chunks where none is given: the tokenizer's own (`system_text`), or a general one."""
    return getattr(tokenizer, "init_kwargs", {}).get("system_text") or SYSTEM


def _ordered(chunks: object) -> tuple[Any, ...]:
    """Reads chunks once: an iterator would be used up by the first request."""
    if isinstance(chunks, str | bytes):
        raise PromptError("chunks must be a sequence of chunks, got one string; write chunks=[text]")
    if not isinstance(chunks, Iterable) or isinstance(chunks, Mapping | AbstractSet):
        raise PromptError(f"chunks must be a sequence of texts or of token ids, got {type(chunks).__name__}")
    return tuple(chunks)


def _plain_ids(part: Any) -> tuple[object, ...]:
    return tuple(np.asarray(part, object).ravel().tolist())


def _checked_texts(chunks: Iterable[str], question: str, system: str | None, separator: str) -> tuple[str, ...]:
    """Returns the chunks, after all that is to be text has been checked."""
    texts = _ordered(chunks)
    named = {f"chunk {i}": text for i, text in enumerate(texts)}
    named |= {"the question": question, "the separator": separator, "the system text": "" if system is None else system}
    for name, text in named.items():
        check_text(text, name)
    return texts


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A prompt's parts as int32 token ids, checked against the model, and whose it is."""

    prefix: np.ndarray
    chunks: tuple[np.ndarray, ...]
    suffix: np.ndarray
    tenant: str = ""

    @cached_property
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
    with_controls = prompt.control_tokens

    def ids(part: TextOrIds, name: str, encoder: Encoder, **options: bool) -> np.ndarray:
        return _ids(part, name, tokenizer, vocab_size, encoder, **options)

    chunks = tuple(ids(chunk, f"chunk {i}", encode) for i, chunk in enumerate(prompt.chunks))
    if empty := [i for i, each in enumerate(chunks) if each.size == 0]:
        raise PromptError(f"chunk {empty[0]} has no tokens; leave it out")
    tokenized = TokenizedPrompt(
        prefix=ids(prompt.prefix, "prefix", encode_opened, control_tokens=with_controls),
        chunks=chunks,
        suffix=ids(prompt.suffix, "suffix", encode, control_tokens=with_controls),
        tenant=prompt.tenant,
    )
    if not _are_known(tokenized.token_ids, vocab_size):  # else no part need be looked at alone
        names = ("prefix", *(f"chunk {i}" for i in range(len(chunks))), "suffix")
        for name, each in zip(names, (tokenized.prefix, *chunks, tokenized.suffix), strict=True):
            _check_vocabulary(each, name, vocab_size)
    return tokenized


def ids_of(part: TextOrIds, name: str, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Returns the ids of text or of token ids, as int32; `name` stands in errors.

    Raises:
        PromptError: text without a tokenizer, or invalid text or ids.
    """
    ids = _ids(part, name, tokenizer, vocab_size, encode)
    _check_vocabulary(ids, name, vocab_size)
    return ids


def _ids(part: TextOrIds, name: str, tokenizer: Any, vocab_size: int, encoder: Encoder, **options: bool) -> np.ndarray:
    """Returns ids as int32. Those that came as such are not looked at: they may not be in the vocabulary."""
    if isinstance(part, str):
        if tokenizer is None and part == "":
            return np.zeros(0, np.int32)
        _require_tokenizer(tokenizer, name)
        check_text(part, name)
        part = encoder(tokenizer, part, **options)
    if isinstance(part, np.ndarray) and part.dtype == np.int32 and part.ndim == 1:
        return np.array(part)  # its owner may change it; and of a masked array, all of its values
    return checked_ids(part, name, vocab_size)


def check_length(total: int, max_tokens: int, what: str = "the prompt", *, taker: str = "the model") -> None:
    """Raises `PromptTooLongError` where `total` tokens are more than the model, or another taker, takes."""
    if total > max_tokens:
        raise PromptTooLongError(
            f"{what} has {total} tokens, but {taker} takes at most {max_tokens}; use fewer or shorter chunks"
        )


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
    _check_vocabulary(array, name, vocab_size)
    return array.astype(np.int32)


def _are_known(ids: np.ndarray, vocab_size: int) -> bool:
    return ids.size == 0 or bool(ids.min() >= 0 and ids.max() < vocab_size)


def _check_vocabulary(ids: np.ndarray, name: str, vocab_size: int) -> None:
    if not _are_known(ids, vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise PromptError(f"{name} has token id {wrong}, which is not in the vocabulary [0, {vocab_size - 1}]")
