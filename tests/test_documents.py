"""Reading, splitting and selecting documents."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_jax.documents import (
    Chunk,
    Document,
    DocumentError,
    chunk_documents,
    read_documents,
    sample_documents,
    select_top_k,
    split_into_chunks,
)
from cacheblend_jax.store.marker import MARKER_NAME


def words(text: str) -> int:
    return len(text.split())


def test_reads_named_files_in_order_and_directories_sorted(tmp_path):
    for name in ("b.txt", "a.md", "c.png", ".hidden.txt", "deep/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    documents = read_documents([tmp_path / "b.txt", tmp_path])
    assert [os.path.relpath(document.path, tmp_path) for document in documents] == ["b.txt", "a.md", "deep/d.txt"]
    assert documents[1].text == "text of a.md"


def test_reads_utf8_with_byte_order_mark_and_any_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nline\rend")
    assert read_documents([tmp_path / "a.txt"])[0].text == "café\nline\nend"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_text_is_encoded(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("café ঢাকা\r\n".encode(encoding))
    assert read_documents(tmp_path / "a.txt")[0].text == "café ঢাকা\n"
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_BE + "café\n".encode("utf-16-be"))
    assert read_documents(tmp_path / "a.txt")[0].text == "café\n"


def test_what_is_passed_over_in_a_directory_is_named_on_one_line(tmp_path, caplog):
    for name, content in {
        "a.md": b"text",
        "b.txt": b"caf\xe9 au lait",
        "c.txt": b"c\0a\0",
        "d.txt": b"",
        "e.pdf": b"",
        "f.PDF": b"",
        "deep/g.html": b"",
        "README": b"",
        ".hidden.pdf": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = read_documents(tmp_path)
    assert [document.text for document in documents] == ["text"]
    (line,) = caplog.messages
    assert line == (
        f"passed over: {str(tmp_path / 'b.txt')!r} is not UTF-8: byte 0xe9 at byte offset 3; "
        f"{str(tmp_path / 'c.txt')!r} is not text: NUL at byte offset 1, as in UTF-16 without a byte order mark; "
        "2 .pdf, 1 without a suffix, 1 .html (only .txt, .md or .markdown files are read: convert others to text)"
    )
    (tmp_path / "a.md").unlink()
    with pytest.raises(DocumentError, match=r"no documents in .* \(passed over: .*2 \.pdf"):
        read_documents(tmp_path)


def test_many_unusable_files_are_counted(tmp_path, caplog):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff\xfe\xfa" if number else b"text")
    read_documents(tmp_path)
    assert caplog.messages[0].count("is not UTF-16-LE") == 5
    assert caplog.messages[0].endswith("; 2 more that cannot be read")


def test_a_directory_that_cannot_be_listed_is_passed_over(tmp_path, monkeypatch, caplog):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("text")
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert len(read_documents(tmp_path)) == 1
    assert caplog.messages == [f"passed over: cannot read {str(tmp_path / 'locked')!r}: Permission denied"]
    with pytest.raises(DocumentError, match="Permission denied; check its permissions"):
        read_documents(tmp_path / "locked")


def test_the_files_of_a_store_are_no_documents(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "kv" / "packs" / "1").mkdir(parents=True)
    (tmp_path / "kv" / MARKER_NAME).write_text("{}")
    (tmp_path / "kv" / "packs" / "1" / "commit_success.txt").write_text("done")
    assert len(read_documents(tmp_path)) == 1
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"binary\0data", "NUL at byte offset 6"),
        ("a.txt", b"caf\xe9 au lait", "byte 0xe9 at byte offset 3"),
        ("a.txt", b" \n", "is empty"),
        ("a.pdf", b"%PDF", "suffix '.pdf'"),
    ],
)
def test_what_is_not_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=message) as error:
        read_documents([tmp_path / name])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_paths_and_empty_directories_are_named(tmp_path):
    with pytest.raises(DocumentError, match="nowhere' does not exist"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(DocumentError, match="in directory"):
        read_documents([tmp_path])


def test_splits_at_paragraph_borders():
    text = "one two three\n\nfour five\n\nsix seven eight nine\n\nten"
    assert split_into_chunks(text, 5, words) == ["one two three\n\nfour five", "six seven eight nine\n\nten"]


def test_a_heading_stays_with_its_paragraph():
    text = "one two three four\n\n# Heading\n\nfive six"
    assert split_into_chunks(text, 5, words) == ["one two three four", "# Heading\n\nfive six"]


def test_a_long_paragraph_is_split_at_sentences_then_words_then_characters():
    assert split_into_chunks("One two. Three four. Five six.", 4, words) == ["One two. Three four.", "Five six."]
    assert split_into_chunks("a b c d e", 2, words) == ["a b", "c d", "e"]
    assert split_into_chunks("abcdefgh", 3, len) == ["abc", "def", "gh"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .\n#é"), max_size=200), st.integers(4, 40))
def test_chunks_fit_and_lose_nothing_but_white_space(text, chunk_tokens):
    chunks = split_into_chunks(text, chunk_tokens, lambda part: len(part.encode()))
    assert all(0 < len(chunk.encode()) <= chunk_tokens for chunk in chunks)
    assert all(chunk in text for chunk in chunks)
    assert "".join("".join(chunks).split()) == "".join(text.split())


def test_chunks_never_mix_documents():
    chunks = chunk_documents([Document("a", "x y"), Document("b", "z\n\nw")], 1, words)
    assert chunks == [Chunk("x", "a", 0), Chunk("y", "a", 1), Chunk("z", "b", 0), Chunk("w", "b", 1)]


def test_bm25_picks_the_telling_chunks_in_document_order():
    texts = ["cats purr at night", "the Cobalt team works in Oslo", "dogs bark", "Ana joined the Cobalt team"]
    chunks = [Chunk(text, "doc", i) for i, text in enumerate(texts)]
    picked = select_top_k(chunks, "Where does the Cobalt team of Ana work?", 2)
    assert [chunk.index for chunk in picked] == [1, 3]
    assert [chunk.index for chunk in select_top_k(chunks, "zebra?", 2)] == [0, 1]
    assert select_top_k(chunks, "Cobalt", 10) == chunks


@pytest.mark.parametrize("size", [0, -3, True, 2.5])
def test_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(DocumentError, match="at least 1"):
        split_into_chunks("text", size, words)
    with pytest.raises(DocumentError, match="at least 1"):
        select_top_k([Chunk("text", "doc", 0)], "text", size)


def test_a_character_larger_than_a_chunk_is_an_error():
    with pytest.raises(DocumentError, match="raise chunk_tokens"):
        split_into_chunks("é", 1, lambda text: len(text.encode()))


def test_scripts_without_spaces_are_searched_by_character():
    texts = ["北京是中国的首都。", "东京是日本的首都。", "The Cobalt team works in Oslo."]
    chunks = [Chunk(text, "a.txt", index) for index, text in enumerate(texts)]
    assert [chunk.text for chunk in select_top_k(chunks, "东京在哪里?", 1)] == [texts[1]]
    assert [chunk.text for chunk in select_top_k(chunks, "Oslo在哪里?", 1)] == [texts[2]]


@pytest.mark.parametrize(
    ("question", "wanted", "others"),
    [
        ("ঢাকা কোথায়?", "ঢাকা বাংলাদেশের রাজধানী।", ["ঢেউ কোথা থেকে আসে", "দিল্লি ভারতের রাজধানী।"]),
        ("दिल्ली में", "दिल्ली भारत की राजधानी है।", ["दिल और दल", "मुंबई बड़ा शहर है।"]),
        ("plan B", "In plan B we wait.", ["In plan C we wait.", "In plan A we wait."]),
        ("What is plan A?", "In plan A we wait.", ["A plan B is a must.", "In plan C we wait."]),
        ("Section 7", "Section 7: fees", ["Section 8: fees", "Section 17: fees"]),
        ("Who writes C++?", "Ana writes C++ all day.", ["Bo writes C all day.", "Cy writes C# all day."]),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full width forms", ["half of the forms", "no forms"]),
        ("office", "the o\ufb03ce of Ana", ["the home of Ana", "the car of Ana"]),
        ("caf\u00e9", "the cafe\u0301 of Ana", ["the cafes of Ana", "the car of Ana"]),
        ("STRASSE", "die Straße nach Oslo", ["der Weg nach Oslo", "die Bahn nach Oslo"]),
        ("🚀?", "we launch 🚀 on Friday", ["we launch 🛑 on Friday", "we launch on Friday"]),
        ("❤", "they ❤\ufe0f it", ["they like it", "they have it"]),
        ("می\u200cخواهم", "میخواهم", ["می", "خواهم"]),
        ("s", "the s curve", ["Ana's curve", "Bo's curve"]),
        ("ｶﾞ", "ガラス", ["カラス", "コラス"]),
    ],
)
def test_words_are_found_in_every_spelling(question, wanted, others):
    for place in range(3):
        texts = [*others[:place], wanted, *others[place:]]
        chunks = [Chunk(text, "doc", number) for number, text in enumerate(texts)]
        assert [chunk.text for chunk in select_top_k(chunks, question, 1)] == [wanted]


def test_duplicates_of_a_text_do_not_fill_the_top_k():
    texts = ["Cobalt is in Oslo.", "Cobalt is in\nOslo.", "Cobalt is  in Oslo. ", "Ridge likes Cobalt.", "Cats purr."]
    chunks = [Chunk(text, f"copy {number}", 0) for number, text in enumerate(texts)]
    assert [chunk.source for chunk in select_top_k(chunks, "Is Cobalt in Oslo?", 2)] == ["copy 0", "copy 3"]
    assert [chunk.source for chunk in select_top_k(chunks, "Cobalt", 9)] == ["copy 0", "copy 3", "copy 4"]


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
