"""From files to the chunks of a prompt, in three steps:

1. `read_documents` reads text, Markdown and HTML, and with an extra PDF and .docx;
2. `chunk_documents` splits each document at paragraph borders, into chunks of at most `chunk_tokens` tokens
   (`split_text` splits one text);
3. a `Retriever`, `BM25Retriever` say, finds those to answer a question from.

`sample_documents` makes a short text of their kind.
"""

from cacheblend_jax.documents.chunking import chunk_documents, split_text
from cacheblend_jax.documents.reading import read_documents
from cacheblend_jax.documents.records import Chunk, Document, DocumentError
from cacheblend_jax.documents.retrieval import BM25Retriever, Retriever
from cacheblend_jax.documents.sampling import sample_documents
from cacheblend_jax.documents.splitting import split_into_chunks

__all__ = [
    "BM25Retriever",
    "Chunk",
    "Document",
    "DocumentError",
    "Retriever",
    "chunk_documents",
    "read_documents",
    "sample_documents",
    "split_into_chunks",
    "split_text",
]
