"""A sample of documents."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_jax.documents import Document, DocumentError, sample_documents


def words(text: str) -> int:
    return len(text.split())


def test_a_sample_is_a_few_paragraphs_from_all_over_and_always_the_same():
    def document(name: str) -> Document:
        return Document(name, "\n\n".join(f"Part {i} of {name} {'says more ' * 20}." for i in range(60)))

    documents = [document("alpha"), Document("empty", ""), document("beta")]
    sample = sample_documents(documents, words)
    paragraphs = sample.strip().split("\n\n")  # two in each excerpt
    assert [paragraph.split()[3] for paragraph in paragraphs[::2]] == ["alpha", "alpha", "alpha", "beta", "beta"]
    assert all(paragraph.startswith("Part ") for paragraph in paragraphs)
    assert len(set(paragraphs)) == len(paragraphs) == 9  # one document ends where an excerpt begins
    assert words(sample) <= 5 * 90
    assert sample_documents(documents, words) == sample
    with pytest.raises(DocumentError, match=r"have 20 characters, expected at least 25000 .*--context neutral"):
        sample_documents([Document("short", "x" * 20)], words)


@given(st.text(alphabet=st.sampled_from("ab \n漢😀"), min_size=50, max_size=200))
@settings(max_examples=20, deadline=None)
def test_any_text_has_a_sample_of_its_own_words(text):
    text *= 500
    for excerpt in sample_documents([Document("any", text)], len).split("\n\n"):
        assert excerpt in text
        assert len(excerpt) <= 90
