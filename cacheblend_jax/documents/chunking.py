"""From documents to chunks by a model's tokenizer; how long texts were cut is remembered between runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from cacheblend_jax.documents.measuring import Span
from cacheblend_jax.documents.records import Chunk, Document, DocumentError
from cacheblend_jax.documents.remembered_cuts import RememberedCuts
from cacheblend_jax.documents.splitting import cut
from cacheblend_jax.model.encoding import count_all
from cacheblend_jax.model.word_borders import word_borders

CHUNK_TOKENS = 512
SEPARATOR = "\n\n"
REMEMBERED_CHARACTERS = 2**18  # shorter texts are cut again faster than a tokenizer is recognised


def split_text(text: str, tokenizer: Any, chunk_tokens: int = CHUNK_TOKENS, *, separator: str = SEPARATOR) -> list[str]:
    """Splits a text at paragraph borders into chunks that each have at most `chunk_tokens` tokens.

    Whole paragraphs are packed until the next does not fit; a chunk is a verbatim excerpt of `text`, so code keeps
    its indentation. A Markdown heading belongs to the paragraph after it. Only a paragraph too long alone (with its
    heading) is split: at sentence ends, else between words, else, for a giant word, between characters.

    The same text is always split in the same way, so that its chunks are found in a store again. How a long text was
    split is remembered in the user's cache directory.

    Args:
        tokenizer: a model's: `model.tokenizer`.
        separator: what prompts put after each chunk (`Prompt.to_answer`); its tokens are counted with the chunk's.

    Raises:
        DocumentError: `chunk_tokens` is not a whole number of at least 1, or too small for one of the characters; or
            there is no tokenizer.
        PromptError: it isn't text, or not valid Unicode.
    """
    return [chunk.text for chunk in chunk_documents([Document("", text)], tokenizer, chunk_tokens, separator=separator)]


def chunk_documents(
    documents: Sequence[Document],
    tokenizer: Any,
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    separator: str = SEPARATOR,
    progress: Callable[[Iterable[Document]], Iterable[Document]] | None = None,
) -> list[Chunk]:
    """Splits every document on its own, so that no chunk mixes two sources; see `split_text`.

    Args:
        progress: wraps the loop over the documents, as tqdm does.

    Raises:
        DocumentError, PromptError: as `split_text`.
    """
    if tokenizer is None:
        raise DocumentError("tokenizer is None: expected a model's tokenizer, which counts a chunk's tokens; pass one")

    borders = word_borders(tokenizer)

    def spans(document: Document) -> Sequence[Span]:
        border = None if borders is None else borders.within(document.text, separator)
        counts = partial(count_all, tokenizer)
        return cut(document.text, chunk_tokens, counts, separator=separator, border=border)

    if sum(len(document.text) for document in documents) < REMEMBERED_CHARACTERS:
        return _chunks(documents, spans, progress)
    with RememberedCuts(tokenizer, chunk_tokens, separator) as remembered:
        return _chunks(documents, lambda document: remembered.cuts(document.text, lambda: spans(document)), progress)


def _chunks(
    documents: Sequence[Document],
    spans: Callable[[Document], Sequence[Span]],
    progress: Callable[[Iterable[Document]], Iterable[Document]] | None,
) -> list[Chunk]:
    return [
        Chunk(document.text[start:end], document.path, index)
        for document in (progress(documents) if progress else documents)
        for index, (start, end) in enumerate(spans(document))
    ]
