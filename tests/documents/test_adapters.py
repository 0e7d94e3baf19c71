"""Retrievers of other libraries, through the adapters that the guide shows; needs the extra `retrievers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacheblend_jax.documents import Retriever

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "model.md"
TEXTS = ["Cobalt is in Oslo.", "Ridge is in Lima.", "Cats purr."]


def adapter(name: str) -> type:
    """Returns a class that the guide defines."""
    (block,) = (text for text in GUIDE.read_text(encoding="utf-8").split("```") if f"class {name}" in text)
    namespace: dict = {}
    exec(block.removeprefix("python"), namespace)
    return namespace[name]


def test_a_retriever_of_langchain_plugs_in():
    pytest.importorskip("langchain_core")
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    found = InMemoryVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=16))
    retriever: Retriever = adapter("FromLangChain")(found.as_retriever(search_kwargs={"k": 2}))
    chunks = retriever.retrieve(TEXTS[1])  # whose vector is its own alone
    assert chunks[0].text == TEXTS[1]
    assert len(chunks) == 2


def test_a_retriever_of_llama_index_plugs_in():
    pytest.importorskip("llama_index.core")
    from llama_index.core import MockEmbedding, VectorStoreIndex
    from llama_index.core.schema import TextNode

    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MockEmbedding(embed_dim=8))
    retriever: Retriever = adapter("FromLlamaIndex")(index.as_retriever(similarity_top_k=2))
    chunks = retriever.retrieve("Where is Cobalt?")
    assert len({chunk.text for chunk in chunks} & set(TEXTS)) == 2
