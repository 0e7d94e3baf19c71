"""A prompt's tokens as people read them: each one's text, and the named parts that they are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.errors import CacheBlendError

INCOMPLETE = "\ufffd"  # what tokenizers print for a part of a character
LONGEST_CHARACTER = 4  # tokens: bytes in UTF-8
PREFIX, QUESTION = "prefix", "question"


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of a prompt: the prefix, a chunk or the question; `stop` is after the last one."""

    name: str
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.stop - self.start

    @property
    def middle(self) -> float:
        """Where it is labelled, in tokens."""
        return (self.start + self.stop - 1) / 2

    def moved(self, tokens: int) -> Part:
        """Returns the part so many tokens further on."""
        return Part(self.name, self.start + tokens, self.stop + tokens)


def consecutive_parts(names: Sequence[str], lengths: Sequence[int]) -> tuple[Part, ...]:
    """Returns parts of these lengths, one after the other from the first token on."""
    parts, start = [], 0
    for name, length in zip(names, lengths, strict=True):
        parts.append(Part(name, start, start + length))
        start += length
    return tuple(parts)


def parts_of(prompt: TokenizedPrompt, chunk_names: Sequence[str] | None = None) -> tuple[Part, ...]:
    """Returns a prompt's parts: prefix, each chunk, question. Prefix and question are there even where they are empty.

    Raises:
        CacheBlendError: there are not as many names as chunks.
    """
    if chunk_names is None:
        chunk_names = [f"chunk {number}" for number in range(len(prompt.chunks))]
    if len(chunk_names) != len(prompt.chunks):
        raise CacheBlendError(
            f"chunk_names must have a name for each of the prompt's {len(prompt.chunks)} chunks, got {len(chunk_names)}"
        )
    tokens = (prompt.prefix, *prompt.chunks, prompt.suffix)
    names = (PREFIX, *chunk_names, QUESTION)
    return consecutive_parts(names, [ids.size for ids in tokens])


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to those before it; without a tokenizer, its id.

    A character that spans tokens is the last one's text; that of the others is empty. Together the texts are what the
    tokenizer prints for all of them.
    """
    ids = list(token_ids)
    if tokenizer is None:
        return [f"{token} " for token in ids]
    texts: list[str] = []
    read = known = 0  # ids[read:known] are decoded once more, since a tokenizer may print a blank between tokens
    for number in range(len(ids)):
        before, after = tokenizer.decode(ids[read:known]), tokenizer.decode(ids[read : number + 1])
        if after.endswith(INCOMPLETE) and number - known < LONGEST_CHARACTER - 1 and number < len(ids) - 1:
            texts.append("")
            continue
        texts.append(after.removeprefix(before))
        read, known = known, number + 1
    return texts


def shortened(text: str, length: int) -> str:
    """Returns a text of at most `length` characters: its middle is left out, since names often differ in their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def printable(text: str) -> str:
    """Returns a text with signs in place of what cannot be printed: control characters, and halves of surrogate pairs.

    Line breaks and tabs stay. Neither fonts nor HTML have the others.
    """
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return INCOMPLETE if 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE else character


def word(text: str) -> str:
    """Returns a token's text as it labels an axis: without blanks around it, and with signs in place of other ones."""
    signs = text.strip(" ").replace("\n", "¶").replace("\t", "⇥")
    return signs or ("␣" if text else "·")
