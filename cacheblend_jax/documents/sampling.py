"""A sample of documents: a short text of their kind, for chunks to be precomputed after."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from cacheblend_jax.documents.records import Document, DocumentError
from cacheblend_jax.documents.splitting import split_into_chunks

EXCERPTS = 5
EXCERPT_TOKENS = 90
EXCERPT_CHARACTERS = 500  # enough for so many tokens in most scripts
LEAST_CHARACTERS = 10 * EXCERPTS * EXCERPT_CHARACTERS  # of all documents: else a chunk is often part of the sample
BETWEEN = "\n\n"


def sample_documents(documents: Sequence[Document], count_tokens: Callable[[str], int]) -> str:
    """Returns a few excerpts of the documents, about 450 tokens in all, from places that are evenly spaced.

    Each is the beginning of a paragraph, where one begins nearby. The same documents give the same sample.

    Raises:
        DocumentError: the documents are too short for a sample of them to stand for the rest.
    """
    total = sum(len(document.text) for document in documents)
    if total < LEAST_CHARACTERS:
        raise DocumentError(
            f"the documents have {total} characters, expected at least {LEAST_CHARACTERS} to take a sample of; "
            "use the packaged text instead (--context neutral)"
        )
    ends = list(accumulate(len(document.text) for document in documents))
    excerpts = []
    for number in range(EXCERPTS):
        at = total * (2 * number + 1) // (2 * EXCERPTS)
        document = bisect_right(ends, at)
        text = documents[document].text
        excerpts.append(_excerpt(text, at - (ends[document] - len(text)), count_tokens))
    return BETWEEN.join(excerpt for excerpt in excerpts if excerpt) + BETWEEN


def _excerpt(text: str, at: int, count_tokens: Callable[[str], int]) -> str:
    """Returns the beginning of the paragraph at a place, or of the words there where that is far away."""
    start = text.rfind(BETWEEN, max(at - EXCERPT_CHARACTERS, 0), at)
    if start < 0:
        start = max(text.rfind(" ", 0, at), 0) if at > EXCERPT_CHARACTERS else 0
    excerpt = text[start : start + EXCERPT_CHARACTERS].strip()
    chunks = split_into_chunks(excerpt, EXCERPT_TOKENS, count_tokens) if excerpt else [""]
    return chunks[0]
