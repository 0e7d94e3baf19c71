"""Reads text files and directories of them, and says what it passes over."""

from __future__ import annotations

import codecs
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cacheblend_jax.documents.records import Document, DocumentError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".markdown")
STORE_MARKER = "cacheblend-store.json"  # in every store's directory, whose files are no documents
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
NAMED_FILES, NAMED_SUFFIXES = 5, 8


@dataclass
class PassedOver:
    """What was found in directories and not read: files of other kinds by suffix, and text files with the reason."""

    others: Counter[str] = field(default_factory=Counter)
    unusable: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Names all of it on one line; empty where there is nothing."""
        parts = self.unusable[:NAMED_FILES]
        if more := len(self.unusable) - len(parts):
            parts.append(f"{more} more that cannot be read")
        if self.others:
            kinds = [f"{count} {suffix}" for suffix, count in self.others.most_common(NAMED_SUFFIXES)]
            kinds += ["others"] if len(self.others) > NAMED_SUFFIXES else []
            parts.append(f"{', '.join(kinds)} (only {_suffixes()} files are read: convert others to text)")
        return f"passed over: {'; '.join(parts)}" if parts else ""

    def in_brackets(self) -> str:
        """Returns the line as the end of another one."""
        line = self.line()
        return f" ({line})" if line else ""


def read_documents(paths: str | Path | Sequence[str | Path]) -> list[Document]:
    """Reads the named files, and every text file under the named directories, each file once.

    Files keep the order in which they are named; a directory's entries are sorted by name, so that the same folder
    always gives the same prompt. In a directory, hidden entries, links to directories, chunk stores and empty files are
    passed over silently; files with other suffixes, and those that cannot be read as text, are named in the log, all on
    one line.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DocumentError: there is nothing to read, or a named path is missing, unreadable, empty or not text.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    documents: dict[Path, Document] = {}
    passed_over = PassedOver()
    for path in map(Path, named):
        for file in _text_files(path, passed_over):
            identity = file.resolve()
            if identity in documents and file != path:
                continue
            try:
                text = _read_text(file)
            except DocumentError as error:
                if file == path:
                    raise
                passed_over.unusable.append(_what_is_wrong(error))
                continue
            if text.strip():
                documents.setdefault(identity, Document(str(file), text))
            elif file == path:
                raise DocumentError(f"{_quoted(file)} is empty: expected text; fill it or leave it out")
    if not documents:
        given = ", ".join(_quoted(path) for path in named) or "no paths"
        raise DocumentError(
            f"no documents in {given}: expected at least one non-empty {_suffixes()} file; name one"
            + passed_over.in_brackets()
        )
    if line := passed_over.line():
        logger.warning("%s", line)
    return list(documents.values())


def _text_files(path: Path, passed_over: PassedOver) -> list[Path]:
    """Lists the text files that a path stands for: itself, or those of the directory."""
    try:
        if path.is_dir():
            files = list(_walk(path, passed_over, is_named=True))
            if not files:
                raise DocumentError(
                    f"no {_suffixes()} files in directory {_quoted(path)}: add one or name another directory"
                    + passed_over.in_brackets()
                )
            return files
        if not path.exists():
            raise DocumentError(f"{_quoted(path)} does not exist: expected a file or directory; check the path")
        if not path.is_file():
            raise DocumentError(f"{_quoted(path)} is neither a file nor a directory: save its content to a file")
    except OSError as error:
        raise _unreadable(path, error) from error
    if not _has_text_suffix(path):
        raise DocumentError(
            f"{_quoted(path)} has suffix {path.suffix!r}: expected {_suffixes()}; convert it to text and rename it"
        )
    return [path]


def _walk(directory: Path, passed_over: PassedOver, *, is_named: bool = False) -> Iterator[Path]:
    """Yields the visible text files under `directory`, sorted by name, without following links to directories."""
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        if is_named:
            raise _unreadable(directory, error) from error
        passed_over.unusable.append(_what_is_wrong(_unreadable(directory, error)))
        return
    if any(entry.name == STORE_MARKER for entry in entries):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(entry, passed_over)
        elif not _has_text_suffix(entry):
            passed_over.others[entry.suffix.lower() or "without a suffix"] += 1
        elif entry.is_file():
            yield entry


def _read_text(path: Path) -> str:
    """Decodes a file: no byte order mark, and every line ends with a bare newline."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    nul = content.find(b"\0") if encoding == "utf-8" else -1
    if nul >= 0:
        raise DocumentError(
            f"{_quoted(path)} is not text: NUL at byte offset {nul}{_guess(content)}; expected UTF-8, or UTF-16 with a "
            "byte order mark; leave it out or convert it"
        )
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise DocumentError(
            f"{_quoted(path)} is not {encoding.upper()}: byte 0x{content[offset]:02x} at byte offset {offset}; "
            f"convert it, for instance with iconv -f windows-1252 -t utf-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _guess(content: bytes) -> str:
    """Every other byte of Latin text in UTF-16 is NUL."""
    beginning = content[:1000]
    return ", as in UTF-16 without a byte order mark" if 3 * beginning.count(0) > len(beginning) else ""


def _has_text_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _quoted(path: str | Path) -> str:
    """Quotes a path so that a line break in its name cannot break the one-line message."""
    return repr(os.fspath(path))


def _what_is_wrong(error: DocumentError) -> str:
    """Returns an error without its advice, which need not be repeated for every file."""
    return str(error).partition("; ")[0]


def _unreadable(path: Path, error: OSError) -> DocumentError:
    reason = error.strerror or type(error).__name__
    remedy = "check its permissions or leave it out" if isinstance(error, PermissionError) else "leave it out"
    return DocumentError(f"cannot read {_quoted(path)}: {reason}; {remedy}")
