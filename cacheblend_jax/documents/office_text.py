"""The text of PDF and .docx files, by the packages pypdf and python-docx: those of the extra `documents`."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from cacheblend_jax.documents.docx_text import docx_blocks
from cacheblend_jax.documents.records import DocumentError
from cacheblend_jax.errors import one_line

MOST_UNPACKED = 2**28  # bytes: what a .docx may unpack to
BETWEEN = "\n\n"


def pdf_text(name: str, content: bytes) -> str:
    """Returns the text of a PDF's pages; `name` stands in errors.

    Raises:
        DocumentError: it is damaged, encrypted, or has no text.
    """
    with _without_warnings(), _damage_named(name, "a PDF"):
        import pypdf

        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{name} is encrypted: expected a PDF without a password; save it without one")
        text = BETWEEN.join(page.extract_text().strip() for page in reader.pages)
    if not text.strip():
        raise DocumentError(f"{name} has no text, only pictures perhaps; run a text recognition over it")
    return text


def docx_text(name: str, content: bytes) -> str:
    """Returns the text of a Word file (see `docx_blocks`); `name` stands in errors.

    Raises:
        DocumentError: it is damaged, or unpacks to more than `MOST_UNPACKED` bytes.
    """
    with _damage_named(name, "a .docx file"):
        import docx

        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            unpacked = sum(part.file_size for part in parts.infolist())
        if unpacked > MOST_UNPACKED:
            raise DocumentError(f"{name} unpacks to {unpacked} bytes, expected at most {MOST_UNPACKED}; split it")
        return BETWEEN.join(docx_blocks(docx.Document(io.BytesIO(content))))


@contextmanager
def _damage_named(name: str, kind: str) -> Iterator[None]:
    """Makes one error of those that a damaged file raises, which may be of any type."""
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:
        raise DocumentError(f"{name} is not {kind} that can be read: {one_line(error)}; leave it out") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps pypdf's logger quiet: it warns of every fault that it has mended."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
