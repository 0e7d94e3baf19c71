"""A document, a chunk of one, and the error that names what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

from cacheblend_jax.errors import CacheBlendError, is_whole_number


class DocumentError(CacheBlendError):
    """Documents cannot be read, split or searched: a path, its content, or a size is not usable."""


@dataclass(frozen=True)
class Document:
    """One file's text, with the path under which it was found."""

    path: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A verbatim excerpt of a document: `source` is the document's path, `index` its number within that document."""

    text: str
    source: str = ""
    index: int = 0


def check_at_least_one(name: str, value: object) -> None:
    """Raises `DocumentError` where a size is not a whole number of at least 1."""
    if not is_whole_number(value, least=1):
        raise DocumentError(f"{name} is {value!r}: expected a whole number of at least 1; pass for instance {name}=8")
