"""From a conversation to a prompt: which of its texts are chunks, and where they stand in the model's chat template."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cacheblend_jax.engine.chat_template import check_template, render
from cacheblend_jax.engine.prompt import PLAIN_QUESTION, Prompt, default_system
from cacheblend_jax.errors import PromptError
from cacheblend_jax.model.encoding import encode, encode_opened

Ids = Sequence[int] | np.ndarray
MARK = re.compile(r"\[\[cacheblend:([a-z]+) (\d+)\]\]")
UNSTEADY = re.compile("strftime_now|random|lipsum")  # in a template: what differs from time to time
MOST_FORMS = 256  # of conversations that are known at a time


@runtime_checkable
class TextEncoder(Protocol):
    """What `encode` is to one tokenizer."""

    def __call__(self, text: str, *, control_tokens: bool = False) -> Ids:
        """Returns a text's ids; what users wrote stays text, what the template printed has control tokens."""


@dataclass(frozen=True)
class Message:
    """A message: its role (`system`, `user` or `assistant`), and the texts that it consists of."""

    role: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Conversation:
    """What a prompt is made of.

    The chunks are the documents, and, of the first message of a user that has several parts, all but the last one, the
    question. Later messages' parts are plain text: a prompt's chunks stand together. With documents, the chunks stand
    in the first message of a user.
    """

    messages: tuple[Message, ...]
    documents: tuple[str, ...] = ()

    @property
    def place(self) -> int:
        """The message in which the chunks stand.

        Raises:
            PromptError: no message is a user's.
        """
        of_user = [number for number, message in enumerate(self.messages) if message.role == "user"]
        if not of_user:
            raise PromptError("messages have none of the role 'user'; add the question as one")
        in_parts = [number for number in of_user if len(self.messages[number].parts) > 1]
        return of_user[0] if self.documents or not in_parts else in_parts[0]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the client wrote."""
        return (*self.documents, *(part for message in self.messages for part in message.parts))

    @property
    def part_chunks(self) -> tuple[str, ...]:
        """The chunks that are parts of a message."""
        return self.messages[self.place].parts[:-1]


def prompt_of(
    conversation: Conversation,
    tokenizer: Any,
    *,
    separator: str = "\n\n",
    template_arguments: Mapping[str, Any] | None = None,
    tenant: str = "",
    encode_text: TextEncoder | None = None,
    templates: KnownTemplates | None = None,
) -> Prompt:
    """Returns the prompt that has a conversation answered: by the tokenizer's chat template, where it has one.

    All its parts are token ids.

    What the template prints before the chunks is the prefix, what it prints after them the suffix. Control tokens come
    from it alone. Documents are given to a template that prints them; others stand before the message's own chunks.

    Args:
        encode_text: returns what `encode` does for a text, or knows it already.
        templates: knows what the template, with these arguments, has printed for conversations of the same form.

    Raises:
        PromptError: no message is a user's, or the template refuses the conversation or does not print it in order.
    """
    texts = encode_text or partial(encode, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        return _plain_prompt(conversation, tokenizer, texts, separator, tenant)
    arguments = template_arguments or {}
    pieces = (templates or KnownTemplates()).pieces(conversation, tokenizer, arguments)
    return _cut(conversation, partial(encode, tokenizer), texts, pieces, separator, tenant)


def _plain_prompt(
    conversation: Conversation, tokenizer: Any, encode_text: TextEncoder, separator: str, tenant: str
) -> Prompt:
    """Builds the prompt as `Prompt.to_answer` does without a template, with what was said before and after."""
    place, messages = conversation.place, conversation.messages
    system = separator.join(_texts(messages, "system")) or default_system(tokenizer)
    before, after = _spoken(messages[:place], separator), _spoken(messages[place + 1 :], separator)
    question = PLAIN_QUESTION.format(messages[place].parts[-1])
    chunks = [encode_text(text + separator) for text in (*conversation.documents, *conversation.part_chunks)]
    prefix = encode_opened(tokenizer, system + separator + before)
    return Prompt(prefix, chunks, encode(tokenizer, (question + after).rstrip(" ")), tenant=tenant)


def _texts(messages: Sequence[Message], role: str) -> list[str]:
    return [part for message in messages if message.role == role for part in message.parts]


def _spoken(messages: Sequence[Message], separator: str) -> str:
    """Returns turns as the plain form has them, an answer after each question."""
    said = []
    for message in messages:
        text = separator.join(message.parts)
        if message.role == "user":
            said.append(PLAIN_QUESTION.format(text))
        elif message.role == "assistant":
            said.append(f" {text}{separator}")
    return "".join(said)


@dataclass(frozen=True)
class _Piece:
    """What the template printed (`kind` is empty), or the place of a message's or of a document's text."""

    text: str
    kind: str = ""
    number: int = 0


class KnownTemplates:
    """What a chat template has printed around texts, by a conversation's form: no text of it has a part in that.

    For one tokenizer and the same arguments. A template that may print something else each time is run each time.
    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Piece]] = {}

    def pieces(self, conversation: Conversation, tokenizer: Any, arguments: Mapping[str, Any]) -> list[_Piece]:
        """Returns what is printed, and the places of texts in it.

        Raises:
            PromptError: as `prompt_of`.
        """
        template = _template_of(tokenizer, arguments)
        form = template, conversation.place, len(conversation.documents), *(each.role for each in conversation.messages)
        is_steady = isinstance(template, str) and not UNSTEADY.search(template)
        if is_steady and (known := self._known.get(form)) is not None:
            return known
        check_template(tokenizer, arguments)
        pieces = _rendered_with_documents(conversation, tokenizer, arguments)
        if pieces is None:
            pieces = _rendered(conversation, tokenizer, arguments)
        if is_steady:
            if len(self._known) >= MOST_FORMS:
                self._known = {}  # not `clear`: another thread may be adding to it
            self._known[form] = pieces
        return pieces


def _template_of(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """Returns the template that is run: the arguments may name one of several, or bring their own."""
    own, given = tokenizer.chat_template, arguments.get("chat_template")
    if given is None:
        return own
    return own.get(given, given) if isinstance(own, Mapping) else given


def _rendered(conversation: Conversation, tokenizer: Any, arguments: Mapping[str, Any]) -> list[_Piece]:
    """Renders the conversation around marks, each in place of a message's text.

    If the template refuses system messages, or drops them, their texts begin the first message of the user.
    """
    numbers = range(len(conversation.messages))
    try:
        return _pieces(conversation, tokenizer, arguments, [[number] for number in numbers])
    except PromptError:  # templates raise whatever they like to refuse a role
        system = [number for number in numbers if conversation.messages[number].role == "system"]
        if not system:
            raise
    others = [[number] for number in numbers if number not in system]
    first = next((turn for turn in others if conversation.messages[turn[0]].role == "user"), None)
    if first is None:
        raise PromptError("messages have none of the role 'user'; add the question as one")
    first[:0] = system
    return _pieces(conversation, tokenizer, arguments, others)


def _rendered_with_documents(
    conversation: Conversation, tokenizer: Any, arguments: Mapping[str, Any]
) -> list[_Piece] | None:
    """As `_rendered`, with the documents where the template prints them; `None` where it does not, or after chunks."""
    if not conversation.documents or "documents" not in str(_template_of(tokenizer, arguments)):
        return None
    given = [{"title": "", "text": _mark("document", number)} for number in range(len(conversation.documents))]
    try:
        pieces = _rendered(conversation, tokenizer, {**arguments, "documents": given})
    except PromptError:
        return None
    marked = [piece.kind + str(piece.number) for piece in pieces if piece.kind]
    documents = [f"document{number}" for number in range(len(given))]
    place = marked.index(f"message{conversation.place}")
    start = marked.index("document0") if "document0" in marked else place
    return pieces if marked[start : start + len(documents)] == documents and start < place else None


def _pieces(
    conversation: Conversation, tokenizer: Any, arguments: Mapping[str, Any], turns: Sequence[Sequence[int]]
) -> list[_Piece]:
    """Renders turns, each of one or more messages' texts, and splits what is printed at the marks.

    Raises:
        PromptError: the template fails, or does not print every message once and in order.
    """
    messages = [
        {"role": conversation.messages[turn[-1]].role, "content": "\n\n".join(_mark("message", each) for each in turn)}
        for turn in turns
    ]
    text, pieces, end = render(tokenizer, messages, arguments), [], 0
    for match in MARK.finditer(text):
        pieces += [_Piece(text[end : match.start()]), _Piece("", match[1], int(match[2]))]
        end = match.end()
    pieces.append(_Piece(text[end:]))
    printed = [piece.number for piece in pieces if piece.kind == "message"]
    if printed != list(itertools.chain.from_iterable(turns)):
        raise PromptError("the tokenizer's chat template does not print every message exactly once, in order")
    return pieces


def _mark(kind: str, number: int) -> str:
    return f"[[cacheblend:{kind} {number}]]"


def _cut(
    conversation: Conversation,
    encode_new: TextEncoder,
    encode_text: TextEncoder,
    pieces: Sequence[_Piece],
    separator: str,
    tenant: str,
) -> Prompt:
    """Cuts what was rendered into prefix, chunks and suffix, and encodes each.

    Args:
        encode_new: for the question, which is another one in each request.
    """
    kinds = [(piece.kind, piece.number) for piece in pieces]
    place = kinds.index(("message", conversation.place))
    documents = [at for at, piece in enumerate(pieces) if piece.kind == "document"]
    parts = [encode_text(text + separator) for text in conversation.part_chunks]

    def encoded(some: Sequence[_Piece]) -> np.ndarray:
        return _encoded(conversation, encode_text, some, separator)

    chunks: list[Ids]
    if documents:
        start, chunks = documents[0], _document_chunks(conversation, encode_text, pieces, documents)
        # What the template prints between the last document and the message's own chunks goes with the first of these.
        chunks[-1] = _joined([chunks[-1], encoded(pieces[documents[-1] + 1 : place])])
    else:
        start, chunks = place, [encode_text(text + separator) for text in conversation.documents]
    question = encode_new(conversation.messages[conversation.place].parts[-1])
    suffix = _joined([question, encoded(pieces[place + 1 :])])
    return Prompt(encoded(pieces[:start]), [*chunks, *parts], suffix, tenant=tenant)


def _document_chunks(
    conversation: Conversation,
    encode_text: TextEncoder,
    pieces: Sequence[_Piece],
    places: Sequence[int],
) -> list[Ids]:
    """Returns the documents' ids, each with what the template prints between it and the one before."""
    chunks = list[Ids]()
    for before, at in zip([None, *places[:-1]], places, strict=True):
        printed = "" if before is None else "".join(piece.text for piece in pieces[before + 1 : at])
        text = conversation.documents[pieces[at].number]
        chunks.append(_joined([encode_text(printed, control_tokens=True), encode_text(text)]))
    return chunks


def _encoded(
    conversation: Conversation,
    encode_text: TextEncoder,
    pieces: Sequence[_Piece],
    separator: str,
) -> np.ndarray:
    """Encodes pieces: the template's with control tokens, the messages' texts without.

    A system text is encoded together with what the template prints around it, as `Prompt.from_chat_template` does, so
    that both give the same prefix; where it spells out control tokens, by itself.
    """
    ids = list[Ids]()
    joined = ""
    for piece in pieces:
        if not piece.kind:
            joined += piece.text
            continue
        message = conversation.messages[piece.number]
        text = separator.join(message.parts)
        in_text = encode_text(text)
        if message.role == "system" and np.array_equal(in_text, encode_text(text, control_tokens=True)):
            joined += text
            continue
        ids += [encode_text(joined, control_tokens=True), in_text]
        joined = ""
    return _joined([*ids, encode_text(joined, control_tokens=True)])


def _joined(ids: Sequence[Ids]) -> np.ndarray:
    return np.concatenate([np.asarray(each, np.int32) for each in ids])
