"""From files on disk to the chunks of a prompt, in three steps:

1. `read_documents` reads plain text and Markdown files;
2. `chunk_documents` splits each document at paragraph borders, into chunks of at most `chunk_tokens` tokens;
3. `select_top_k` keeps the chunks that share the most telling words with the question (BM25).

`sample_documents` makes a short text of their kind. Nothing needs a model: a function that the caller passes in counts
tokens.
"""

from cacheblend_jax.documents.reading import read_documents
from cacheblend_jax.documents.records import Chunk, Document, DocumentError
from cacheblend_jax.documents.retrieval import by_relevance, select_top_k
from cacheblend_jax.documents.sampling import sample_documents
from cacheblend_jax.documents.splitting import chunk_documents, split_into_chunks

__all__ = [
    "Chunk",
    "Document",
    "DocumentError",
    "by_relevance",
    "chunk_documents",
    "read_documents",
    "sample_documents",
    "select_top_k",
    "split_into_chunks",
]
