"""Reads documents and directories of them, and says what it passes over."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cacheblend_jax.documents.formats import INSTALL, format_of, is_document, quoted, suffixes, text_of, unreadable
from cacheblend_jax.documents.records import Document, DocumentError

logger = logging.getLogger(__name__)

STORE_MARKER = "cacheblend-store.json"  # in every store's directory, whose files are no documents
NAMED_FILES, NAMED_SUFFIXES = 5, 8


@dataclass
class PassedOver:
    """What was found in directories and not read: by suffix, files of other kinds and those that need a package; and
    documents with the reason."""

    others: Counter[str] = field(default_factory=Counter)
    uninstalled: Counter[str] = field(default_factory=Counter)
    unusable: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Names all of it on one line; empty where there is nothing."""
        parts = self.unusable[:NAMED_FILES]
        if more := len(self.unusable) - len(parts):
            parts.append(f"{more} more that cannot be read")
        if self.uninstalled:
            parts.append(f"{_counted(self.uninstalled)} (to read them: {INSTALL})")
        if self.others:
            parts.append(f"{_counted(self.others)} (only {suffixes()} files are read: convert others to text)")
        return f"passed over: {'; '.join(parts)}" if parts else ""

    def in_brackets(self) -> str:
        """Returns the line as the end of another one."""
        line = self.line()
        return f" ({line})" if line else ""


def _counted(kinds: Counter[str]) -> str:
    named = [f"{count} {suffix}" for suffix, count in kinds.most_common(NAMED_SUFFIXES)]
    return ", ".join(named + ["others"] * (len(kinds) > NAMED_SUFFIXES))


def read_documents(paths: str | Path | Sequence[str | Path]) -> list[Document]:
    """Reads the named files, and every document under the named directories, each file once.

    Files keep the order in which they are named; a directory's entries are sorted by name, so that the same folder
    always gives the same prompt. In a directory, hidden entries, links to directories, chunk stores and empty files are
    passed over silently; files with other suffixes, and those that cannot be read, are named in the log, all on one
    line.

    Documents are text, Markdown and HTML, and with the extra `documents` (`pip install 'cacheblend-jax[documents]'`)
    PDF and .docx. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; HTML may declare its encoding. Of HTML and
    .docx, headings become Markdown's, so that they stay with their paragraphs where the text is split.

    Raises:
        DocumentError: there is nothing to read; or a named path is missing, unreadable, empty, of another kind, or not
            what its suffix says.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    documents: dict[Path, Document] = {}
    passed_over = PassedOver()
    for path in (Path(os.path.expanduser(each)) for each in named):
        for file in _document_files(path, passed_over):
            identity = file.resolve()
            if identity in documents and file != path:
                continue
            try:
                text = text_of(file)
            except DocumentError as error:
                if file == path:
                    raise
                passed_over.unusable.append(_what_is_wrong(error))
                continue
            if text.strip():
                documents.setdefault(identity, Document(str(file), text))
            elif file == path:
                raise DocumentError(f"{quoted(file)} is empty: expected text; fill it or leave it out")
    if not documents:
        given = ", ".join(quoted(path) for path in named) or "no paths"
        raise DocumentError(
            f"no documents in {given}: expected at least one non-empty {suffixes()} file; name one"
            + passed_over.in_brackets()
        )
    if line := passed_over.line():
        logger.warning("%s", line)
    return list(documents.values())


def _document_files(path: Path, passed_over: PassedOver) -> list[Path]:
    """Lists the documents that a path stands for: itself, or those of the directory."""
    try:
        if path.is_dir():
            files = list(_walk(path, passed_over, is_named=True))
            if not files:
                raise DocumentError(
                    f"no {suffixes()} files in directory {quoted(path)}: add one or name another directory"
                    + passed_over.in_brackets()
                )
            return files
        if not path.exists():
            raise DocumentError(f"{quoted(path)} does not exist: expected a file or directory; check the path")
        if not path.is_file():
            raise DocumentError(f"{quoted(path)} is neither a file nor a directory: save its content to a file")
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_document(path):
        raise DocumentError(
            f"{quoted(path)} has suffix {path.suffix!r}: expected {suffixes()}; convert it to text and rename it"
        )
    return [path]


def _walk(directory: Path, passed_over: PassedOver, *, is_named: bool = False) -> Iterator[Path]:
    """Yields the visible documents under `directory`, sorted by name, without following links to directories."""
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        if is_named:
            raise unreadable(directory, error) from error
        passed_over.unusable.append(_what_is_wrong(unreadable(directory, error)))
        return
    if any(entry.name == STORE_MARKER for entry in entries):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):  # its directory may be listed, but not entered, say
                passed_over.unusable.append(_what_is_wrong(unreadable(entry, error)))
                continue
            mode = 0  # a link to nothing
        if stat.S_ISDIR(mode):
            if not entry.is_symlink():
                yield from _walk(entry, passed_over)
        elif not is_document(entry):
            passed_over.others[entry.suffix.lower() or "without a suffix"] += 1
        elif not format_of(entry).is_installed:
            passed_over.uninstalled[entry.suffix.lower()] += 1
        elif stat.S_ISREG(mode):
            yield entry


def _what_is_wrong(error: DocumentError) -> str:
    """Returns an error without its advice, which need not be repeated for every file."""
    return str(error).partition("; ")[0]
