"""From files on disk to the chunks of a prompt, in three steps:

1. `read_documents` reads plain text and Markdown files, and refuses whatever is not text;
2. `chunk_documents` splits each document at paragraph borders, into chunks of at most `chunk_tokens` tokens;
3. `select_top_k` keeps the chunks that share the most telling words with the question (BM25).

No step needs a model: a function that the caller passes in counts tokens.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_jax.errors import CacheBlendError, is_whole_number

SUFFIXES = (".txt", ".md", ".markdown")
UTF8_BOM = b"\xef\xbb\xbf"

# A blank line, or the line break before a Markdown heading, which opens a paragraph even without a blank line.
PARAGRAPH_BORDER = re.compile(r"\n\s*\n|\n(?=#{1,6}[ \t])")
# One line "# Title", or a title underlined with = or -.
HEADING = re.compile(r"#{1,6}[ \t][^\n]*|[^\n]+\n(?:=+|-+)")
# White space after a full stop (perhaps with a closing quote or bracket); Chinese and Japanese need no space.
SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])\s+|(?<=[.!?…。！？][\"'”’)\]」』）])\s+"
    r"|(?<=[。！？])(?![。！？”’」』）])|(?<=[。！？][”’」』）])"
)
WORD = re.compile(r"\S+")


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
    source: str
    index: int


# --- reading -----------------------------------------------------------------------------------------------------


def read_documents(paths: str | Path | Sequence[str | Path]) -> list[Document]:
    """Read the named files, and every text file under the named directories, each file once.

    Files keep the order in which they are named; a directory's entries are sorted by name, so that the same folder
    always gives the same prompt. In a directory, hidden entries, links to directories, files with other suffixes and
    empty files are passed over.

    Raises:
        DocumentError: there is nothing to read, or a named path is missing, unreadable, empty or not UTF-8 text.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    documents: dict[Path, Document] = {}
    for path in map(Path, named):
        for file in _text_files(path):
            identity = file.resolve()
            if identity in documents and file != path:
                continue
            text = _read_text(file)
            if text.strip():
                documents.setdefault(identity, Document(str(file), text))
            elif file == path:
                raise DocumentError(f"{_quoted(file)} is empty: expected text; fill it or leave it out")
    if not documents:
        given = ", ".join(_quoted(path) for path in named) or "no paths"
        raise DocumentError(f"no documents in {given}: expected at least one non-empty {_suffixes()} file; name one")
    return list(documents.values())


def _text_files(path: Path) -> list[Path]:
    """List the text files that a path stands for: itself, or those of the directory."""
    try:
        if path.is_dir():
            files = list(_walk(path))
            if not files:
                raise DocumentError(
                    f"no {_suffixes()} files in directory {_quoted(path)}: add one or name another directory"
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


def _walk(directory: Path) -> Iterator[Path]:
    """Yield the visible text files under `directory`, sorted by name, without following links to directories."""
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(directory, error) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(entry)
        elif _has_text_suffix(entry) and entry.is_file():
            yield entry


def _read_text(path: Path) -> str:
    """Decode a UTF-8 file: no byte order mark, and every line ends with a bare newline."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if (nul := content.find(b"\0")) >= 0:
        raise DocumentError(
            f"{_quoted(path)} is not text: NUL at byte offset {nul}; expected UTF-8; leave it out or convert it"
        )
    start = len(UTF8_BOM) if content.startswith(UTF8_BOM) else 0
    try:
        text = content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise DocumentError(
            f"{_quoted(path)} is not UTF-8: byte 0x{content[offset]:02x} at byte offset {offset}; "
            f"expected UTF-8; convert it, for instance with iconv -t utf-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _has_text_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _quoted(path: str | Path) -> str:
    """Quote a path so that a line break in its name cannot break the one-line message."""
    return repr(os.fspath(path))


def _unreadable(path: Path, error: OSError) -> DocumentError:
    reason = error.strerror or type(error).__name__
    return DocumentError(f"cannot read {_quoted(path)}: {reason}; check its permissions or leave it out")


# --- splitting ---------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A stretch text[start:end] that fits into a chunk, and the tokens that it counts on its own."""

    start: int
    end: int
    tokens: int


Measure = Callable[[int, int], int]  # (start, end) -> the tokens of text[start:end]


def split_into_chunks(text: str, chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Split a text at paragraph borders into chunks that each count at most `chunk_tokens` tokens.

    Whole paragraphs are packed until the next does not fit; a chunk is a verbatim excerpt of `text`, so code keeps
    its indentation. A Markdown heading belongs to the paragraph after it. Only a paragraph too long alone (with its
    heading) is split: at sentence ends, else between words, else, for a giant word, between characters.

    Tokens do not add up: two texts joined may count more or fewer tokens than the two apart. So the sum of the
    paragraphs' counts only suggests how many fit, and each chunk is counted again as a whole.

    Raises:
        DocumentError: `chunk_tokens` is not a whole number of at least 1, or too small for one of the characters.
    """
    _check_at_least_one("chunk_tokens", chunk_tokens)

    def measure(start: int, end: int) -> int:
        return count_tokens(text[start:end])

    pieces = list(_fitting_pieces(text, chunk_tokens, measure))
    return [text[start:end] for start, end in _pack(pieces, chunk_tokens, measure)]


def _fitting_pieces(text: str, chunk_tokens: int, measure: Measure) -> Iterator[Piece]:
    """Yield paragraphs; of a paragraph that does not fit, its sentences; of such a sentence, runs of words."""
    for start, end, body in _headed_paragraphs(text):
        tokens = measure(start, end)
        if tokens <= chunk_tokens:
            yield Piece(start, end, tokens)
            continue
        for sentence_start, sentence_end in _between(SENTENCE_END, text, start, end, after=body):
            tokens = measure(sentence_start, sentence_end)
            if tokens <= chunk_tokens:
                yield Piece(sentence_start, sentence_end, tokens)
            else:
                yield from _word_runs(text, sentence_start, sentence_end, tokens, chunk_tokens, measure)


def _headed_paragraphs(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, body) of each paragraph together with the headings before it; its own text is at `body`."""
    headings_start: int | None = None
    end = 0
    for start, end in _between(PARAGRAPH_BORDER, text, 0, len(text)):
        first = start if headings_start is None else headings_start
        if HEADING.fullmatch(text, start, end):
            headings_start = first
        else:
            yield first, end, start
            headings_start = None
    if headings_start is not None:  # the text ends with headings
        yield headings_start, end, headings_start


def _between(border: re.Pattern[str], text: str, start: int, end: int, after: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the non-blank stretches of text[start:end] between borders, trimmed; borders up to `after` don't count."""
    for match in border.finditer(text, start, end):
        if match.end() > after:
            yield from _trimmed(text, start, match.start())
            start = match.end()
    yield from _trimmed(text, start, end)


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the stretch without white space at its ends, or nothing if it is blank."""
    stretch = text[start:end]
    if stripped := stretch.strip():
        start += len(stretch) - len(stretch.lstrip())
        yield start, start + len(stripped)


def _word_runs(text: str, start: int, end: int, tokens: int, chunk_tokens: int, measure: Measure) -> Iterator[Piece]:
    """Cut a sentence of `tokens` tokens into the longest fitting runs of words, and a giant word into characters."""
    words = [match.span() for match in WORD.finditer(text, start, end)]
    guess = len(words) * chunk_tokens // tokens
    first = 0
    while first < len(words):
        run_start = words[first][0]

        def run_tokens(count: int, first: int = first) -> int:
            return measure(words[first][0], words[first + count - 1][1])

        count = _longest_fit(run_tokens, chunk_tokens, guess, len(words) - first)
        if count:
            yield Piece(run_start, words[first + count - 1][1], run_tokens(count))
        else:
            yield from _character_runs(text, *words[first], chunk_tokens, measure)
        guess = count
        first += max(count, 1)


def _character_runs(text: str, start: int, end: int, chunk_tokens: int, measure: Measure) -> Iterator[Piece]:
    """Cut a word that fits nowhere into the longest fitting runs of characters."""
    guess = chunk_tokens
    while start < end:

        def run_tokens(count: int, start: int = start) -> int:
            return measure(start, start + count)

        guess = _longest_fit(run_tokens, chunk_tokens, guess, end - start)
        if not guess:
            raise DocumentError(
                f"chunk_tokens is {chunk_tokens}, but the character {text[start]!r} alone counts {run_tokens(1)} "
                f"tokens: expected room for every character; raise chunk_tokens"
            )
        yield Piece(start, start + guess, run_tokens(guess))
        start += guess


def _pack(pieces: Sequence[Piece], chunk_tokens: int, measure: Measure) -> Iterator[tuple[int, int]]:
    """Join neighbouring pieces, as many as fit, into the (start, end) of each chunk."""
    totals = [0, *accumulate(piece.tokens for piece in pieces)]
    first = 0
    while first < len(pieces):

        def joined_tokens(count: int, first: int = first) -> int:
            return measure(pieces[first].start, pieces[first + count - 1].end)

        guess = bisect_right(totals, totals[first] + chunk_tokens) - 1 - first
        count = _longest_fit(joined_tokens, chunk_tokens, guess, len(pieces) - first)
        count = max(count, 1)  # each piece is known to fit alone
        yield pieces[first].start, pieces[first + count - 1].end
        first += count


def _longest_fit(tokens_of: Callable[[int], int], limit: int, guess: int, most: int) -> int:
    """Find the largest count in 1..most with tokens_of(count) <= limit, starting near `guess`; 0 if none fits.

    Strides away from the guess double until one count fits and a larger one does not; bisection then closes in. A
    good guess calls `tokens_of` twice, a bad one logarithmically often. What is returned has been seen to fit, even
    where `tokens_of` is not quite monotonic.
    """
    fitting, failing = 0, most + 1
    probe, stride = min(max(guess, 1), most), 1
    while failing - fitting > 1:
        if tokens_of(probe) <= limit:
            fitting = probe
            probe = probe + stride
        else:
            failing = probe
            probe = probe - stride
        stride *= 2
        if not fitting < probe < failing:
            probe = (fitting + failing) // 2
    return fitting


def chunk_documents(
    documents: Sequence[Document],
    chunk_tokens: int,
    count_tokens: Callable[[str], int],
    progress: Callable[[Iterable[Document]], Iterable[Document]] | None = None,
) -> list[Chunk]:
    """Split every document on its own, so that no chunk mixes two sources; see `split_into_chunks`.

    Args:
        count_tokens: returns the number of tokens of a text.
        progress: wraps the loop over the documents, as tqdm does.
    """
    return [
        Chunk(text, document.path, index)
        for document in (progress(documents) if progress else documents)
        for index, text in enumerate(split_into_chunks(document.text, chunk_tokens, count_tokens))
    ]


def _check_at_least_one(name: str, value: object) -> None:
    if not is_whole_number(value, least=1):
        raise DocumentError(f"{name} is {value!r}: expected a whole number of at least 1; pass for instance {name}=8")


# --- selecting ---------------------------------------------------------------------------------------------------


def select_top_k(chunks: Sequence[Chunk], question: str, top_k: int) -> list[Chunk]:
    """Pick the `top_k` chunks most relevant to the question by BM25, and return them in their original order.

    BM25 rewards the question's words, rare words the most. The order of relevance is dropped after the choice: in
    the order of the documents a definition stays before its use, and the chunks read as an abridged text. Of equally
    relevant chunks the earlier win, so a question that shares no word with any chunk gets the first `top_k`.

    Raises:
        DocumentError: `top_k` is not a whole number of at least 1, or the package bm25s is missing.
    """
    _check_at_least_one("top_k", top_k)
    bm25s = _import_bm25s()
    scores = _bm25_scores(bm25s, [chunk.text for chunk in chunks], question)
    ranked = sorted(range(len(chunks)), key=lambda number: -scores[number])  # stable: ties keep their order
    return [chunks[number] for number in sorted(ranked[:top_k])]


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai … Han
SEARCH_WORD = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}"


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise DocumentError(
            "choosing chunks by relevance needs the package bm25s: "
            "install it with pip install 'cacheblend-jax[retrieval]', or use every chunk with --all"
        ) from error
    return bm25s


def _bm25_scores(bm25s: Any, texts: list[str], question: str) -> list[float]:
    """Score each text; all zero where BM25 is undefined, because no word of the question is in any text.

    Words are runs of two or more letters or digits, in lower case and without English stop words; in scripts that are
    written without spaces, single characters.
    """
    corpus = bm25s.tokenize(texts, token_pattern=SEARCH_WORD, show_progress=False)
    (words,) = bm25s.tokenize([question], token_pattern=SEARCH_WORD, show_progress=False, return_ids=False)
    known = [word for word in words if word in corpus.vocab]
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    return index.get_scores(known).tolist()
