"""The kinds of files that are documents, by suffix, and the text of each."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cacheblend_jax.documents.html_text import declared_charset, html_text
from cacheblend_jax.documents.office_text import docx_text, pdf_text
from cacheblend_jax.documents.records import DocumentError
from cacheblend_jax.errors import one_line

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
INSTALL = "pip install 'cacheblend-jax[documents]'"  # what reads PDF and .docx


class Format(NamedTuple):
    """A kind of file: how its bytes become text, and the package that this needs."""

    text_of: Callable[[Path, bytes], str]
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether files of this kind can be read."""
        return self.package is None or find_spec(self.package) is not None


def text_of(path: Path) -> str:
    """Returns a document's text: valid Unicode, no byte order mark, and every line ends with a bare newline.

    Raises:
        DocumentError: it cannot be read, or is not of the kind that its suffix says.
    """
    kind = format_of(path)
    if not kind.is_installed:
        raise DocumentError(f"{quoted(path)} needs the package {kind.package}: install it with {INSTALL}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    # PDF and UTF-7 can have halves of surrogate pairs: two make a character, one alone is unknown.
    text = kind.text_of(path, content).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def format_of(path: Path) -> Format:
    """Returns the kind of a file that `is_document` is true of."""
    return FORMATS[path.suffix.lower()]


def is_document(path: Path) -> bool:
    """Returns whether a file's suffix is that of a document."""
    return path.suffix.lower() in FORMATS


def suffixes() -> str:
    """Names the suffixes of documents."""
    *others, last = FORMATS
    return f"{', '.join(others)} or {last}"


def quoted(path: str | Path) -> str:
    """Quotes a path so that a line break in its name cannot break the one-line message."""
    return repr(os.fspath(path))


def unreadable(path: Path, error: OSError) -> DocumentError:
    """Returns the error of a path that the system does not let be read."""
    reason = error.strerror or type(error).__name__
    remedy = "check its permissions or leave it out" if isinstance(error, PermissionError) else "leave it out"
    return DocumentError(f"cannot read {quoted(path)}: {reason}; {remedy}")


def _plain(path: Path, content: bytes) -> str:
    return _decoded(path, content, "utf-8")


def _html(path: Path, content: bytes) -> str:
    try:
        return html_text(_decoded(path, content, declared_charset(content) or "utf-8"))
    except AssertionError as error:  # the parser's word for a declaration that it does not know
        raise DocumentError(
            f"{quoted(path)} is not HTML: {one_line(error)}; save the page again, or as text"
        ) from error


def _pdf(path: Path, content: bytes) -> str:
    return pdf_text(quoted(path), content)


def _docx(path: Path, content: bytes) -> str:
    return docx_text(quoted(path), content)


def _decoded(path: Path, content: bytes, default: str) -> str:
    """Decodes a file by its byte order mark, or else by the default."""
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    encoding = MARKS.get(mark, default)
    nul = -1 if encoding.startswith(("utf-16", "utf-32")) else content.find(b"\0")
    if nul >= 0:
        raise DocumentError(
            f"{quoted(path)} is not text: NUL at byte offset {nul}{_guess(content)}; expected UTF-8, or UTF-16 with a "
            "byte order mark; leave it out or convert it"
        )
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise DocumentError(
            f"{quoted(path)} is not {encoding.upper()}: byte 0x{content[offset]:02x} at byte offset {offset}; "
            f"convert it, for instance with iconv -f windows-1252 -t utf-8"
        ) from error


def _guess(content: bytes) -> str:
    """Every other byte of Latin text in UTF-16 is NUL."""
    beginning = content[:1000]
    return ", as in UTF-16 without a byte order mark" if 3 * beginning.count(0) > len(beginning) else ""


_TEXT, _HTML = Format(_plain), Format(_html)
FORMATS = {
    ".txt": _TEXT,
    ".md": _TEXT,
    ".markdown": _TEXT,
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".pdf": Format(_pdf, "pypdf"),
    ".docx": Format(_docx, "docx"),
}
