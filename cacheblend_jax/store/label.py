"""What an entry is called: the names that people know it by, and by which the same text is found under other keys."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

PREVIEW_CHARACTERS = 80


@dataclass(frozen=True)
class Label:
    """Says what an entry was computed from; anything that is unknown is empty.

    Attributes:
        model: the model's name: what it was loaded by.
        text: the first words of the chunk.
        text_digest: SHA-256 (hexadecimal) of the chunk's text without white space, which models tokenise differently.
    """

    model: str = ""
    text: str = ""
    text_digest: str = ""


UNKNOWN = Label()


def label_of(model: str, text: str) -> Label:
    """Returns the label of a chunk's KV.

    Args:
        model: the model's name.
        text: the whole chunk; empty where it is not known.
    """
    words = text.split()
    preview = " ".join(text[: 4 * PREVIEW_CHARACTERS].split())[:PREVIEW_CHARACTERS]
    digest = sha256("".join(words).encode(errors="surrogatepass")).hexdigest() if words else ""
    return Label(model, preview, digest)
