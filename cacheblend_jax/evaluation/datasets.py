"""Data sets: the bundled corpus, JSON in the form of CacheBlend's authors, and LongBench's jsonl; local files only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheblend_jax.documents import split_into_chunks
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.corpus import KINDS, examples

BUNDLED = "bundled"
SEED = 2026  # of the bundled questions; the model was trained on others, drawn from small seeds


@dataclass(frozen=True)
class Row:
    """A question with the texts to answer it from, and the answers that count as right.

    Attributes:
        name: unique in its data set.
        kind: of question; empty where the data set has no kinds.
    """

    name: str
    kind: str
    chunks: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def load_rows(
    source: str, *, limit: int | None, chunk_tokens: int, count_tokens: Callable[[str], int], seed: int = SEED
) -> list[Row]:
    """Returns a data set's rows.

    Args:
        source: `"bundled"`, or a `.json` or `.jsonl` file.
        limit: at most so many rows, the first ones; of the bundled corpus, of each kind (200 where it is `None`).
        chunk_tokens: LongBench's contexts are split at paragraph borders into chunks of at most this many tokens.
        count_tokens: returns the number of tokens of a text.
        seed: of the bundled questions.

    Raises:
        CacheBlendError: the file is missing or in neither form, or a row is malformed; names the row and the field.
    """
    if source == BUNDLED:
        return bundled_rows(200 if limit is None else limit, seed)
    path = Path(source)
    if not path.is_file():
        raise CacheBlendError(f"data set {source!r} is neither a file nor {BUNDLED!r}")
    rows = []
    for number, raw in enumerate(_raw_rows(path)):
        if limit is not None and number >= limit:
            break
        where = f"{path.name}: row {number}"
        if not isinstance(raw, dict):
            raise CacheBlendError(f"{where} must be an object, got {type(raw).__name__}")
        name = f"{path.stem}/{number}"
        rows.append(
            _authors_row(raw, name, where)
            if "ctxs" in raw
            else _longbench_row(raw, name, where, chunk_tokens, count_tokens)
        )
    if not rows:
        raise CacheBlendError(f"{path.name} holds no rows")
    return rows


def digest_of(source: str, chunk_tokens: int) -> str:
    """Returns SHA-256 (hexadecimal) of a data set's content and of how it is split."""
    content = b"" if source == BUNDLED else Path(source).read_bytes()
    return hashlib.sha256(f"{source == BUNDLED} {chunk_tokens} {SEED} ".encode() + content).hexdigest()


def bundled_rows(count: int, seed: int = SEED) -> list[Row]:
    """Returns `count` questions of each kind of the bundled corpus."""
    return [
        Row(f"{kind}/{number}", kind, drawn.chunks, drawn.question.text, (drawn.question.answer,))
        for kind in KINDS
        for number, drawn in enumerate(examples(kind, count, seed))
    ]


def _raw_rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise CacheBlendError(f"cannot read {path}: {error}") from error
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too deep, it may be as well
        if path.suffix != ".jsonl":
            raise CacheBlendError(f"{path.name} is not JSON: {error}") from error
    else:
        yield from whole if isinstance(whole, list) else [whole]
        return
    # Not `splitlines`: JSON text may hold other line breaks.
    for number, line in enumerate(line for line in text.split("\n") if line.strip()):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CacheBlendError(f"{path.name}: row {number} is not JSON: {error}") from error


def _authors_row(raw: dict[str, Any], name: str, where: str) -> Row:
    passages = _field(raw, "ctxs", list, where)
    if not passages:
        raise CacheBlendError(f"{where}: field 'ctxs' is empty")
    chunks = []
    for i, passage in enumerate(passages):
        at = f"{where}, ctxs {i}"
        if not isinstance(passage, dict):
            raise CacheBlendError(f"{at} must be an object, got {type(passage).__name__}")
        title = _field(passage, "title", str, at) if "title" in passage else ""
        text = _field(passage, "text", str, at)
        chunks.append(f"{title}\n{text}" if title else text)
    return Row(name, "", tuple(chunks), _field(raw, "question", str, where), _answers(raw, where))


def _longbench_row(
    raw: dict[str, Any], name: str, where: str, chunk_tokens: int, count_tokens: Callable[[str], int]
) -> Row:
    context = _field(raw, "context", str, where)
    chunks = tuple(split_into_chunks(context, chunk_tokens, count_tokens))
    question, answers = _field(raw, "input", str, where), _answers(raw, where)
    # Summaries have no question of their own.
    return Row(name, str(raw.get("dataset", "")), chunks, question or "Summarize.", answers)


def _answers(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    answers = _field(raw, "answers", list, where)
    flat = [str(answer) for group in answers for answer in (group if isinstance(group, list) else [group])]
    if not flat:
        raise CacheBlendError(f"{where}: field 'answers' is empty")
    return tuple(flat)


def _field(raw: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in raw:
        raise CacheBlendError(f"{where}: field {name!r} is missing")
    if not isinstance(raw[name], kind):
        wanted = "text" if kind is str else "a list"
        raise CacheBlendError(f"{where}: field {name!r} must be {wanted}, got {type(raw[name]).__name__}")
    return raw[name]
