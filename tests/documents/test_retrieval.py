"""Finding the chunks that a question is about."""

from __future__ import annotations

import pytest

import cacheblend_jax as cb
from cacheblend_jax.documents import Chunk, DocumentError
from cacheblend_jax.documents.search_words import search_words


def found(texts: list[str], question: str, top_k: int) -> list[str]:
    chunks = [Chunk(text, "doc", number) for number, text in enumerate(texts)]
    return [chunk.text for chunk in cb.BM25Retriever(chunks, top_k).retrieve(question)]


def test_bm25_picks_the_telling_chunks_in_document_order():
    texts = ["cats purr at night", "the Cobalt team works in Oslo", "dogs bark", "Ana joined the Cobalt team"]
    assert found(texts, "Where does the Cobalt team of Ana work?", 2) == [texts[1], texts[3]]
    assert found(texts, "zebra?", 2) == texts[:2]
    assert found(texts, "Cobalt", 10) == texts


def test_the_most_relevant_chunks_come_first_where_ranks_are_asked_for():
    chunks = [Chunk(text, "doc", 0) for text in ("Cobalt, among others: Ridge", "Cats purr.", "Cobalt is in Oslo")]
    retriever = cb.BM25Retriever(chunks, 2)
    assert retriever.ranked("Is Cobalt in Oslo?") == [chunks[2], chunks[0]]
    assert retriever.in_order(retriever.ranked("Is Cobalt in Oslo?")) == [chunks[0], chunks[2]]
    assert retriever.in_order([]) == []


@pytest.mark.parametrize("texts", [[], [""], ["...", "!"]])
def test_texts_without_words_are_no_error(texts):
    assert found(texts, "Where?", 2) == texts


@pytest.mark.parametrize("size", [0, -3, True, 2.5])
def test_a_top_k_that_makes_no_sense_is_refused(size):
    with pytest.raises(DocumentError, match="at least 1"):
        cb.BM25Retriever([], size)


def test_scripts_without_spaces_are_searched_by_short_runs():
    texts = ["北京是中国的首都。", "东京是日本的首都。", "The Cobalt team works in Oslo."]
    assert found(texts, "东京在哪里?", 1) == [texts[1]]
    assert found(texts, "Oslo在哪里?", 1) == [texts[2]]


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
        ("京东", "京东在北京", ["东京在日本", "东北在中国"]),  # the same characters
        ("เมืองหลวง", "กรุงเทพเป็นเมืองหลวงของไทย", ["หลวงพ่ออยู่ในวัดของเมือง", "ลมเย็นกว่าวันก่อนอีก"]),
        ("ປະເທດ", "ລາວເປັນປະເທດ", ["ເທບປະດາ", "ຂ້ອຍກິນເຂົ້າ"]),
        ("서울은 어디에 있나요", "서울에서 산다", ["부산은 항구다", "울산에 있다"]),
        ("كتاب", "هذا كِتَابٌ جديد", ["هذا كاتب جديد", "هذا بيت جديد"]),
        ("أحمد", "جاء احمد أمس", ["جاء محمود أمس", "ذهب علي"]),
        ("کتابی", "كتابي هنا", ["بيتي هنا", "كلبي هنا"]),  # as an Arabic and as a Persian keyboard write them
        ("سلام", "ســـلام للجميع", ["سلم طويل", "بيت كبير"]),
        ("שלום", "שָׁלוֹם עולם", ["שלט בעולם", "בית גדול"]),
        ("istanbul", "İSTANBUL is large", ["Ankara is large", "Izmir is large"]),
        ("room ١٢", "room 12 is free", ["room 13 is free", "room 112 is free"]),
        ("Привет", "ПРИВЕТ, мир", ["Приветливый мир", "мир"]),
    ],
)
def test_words_are_found_in_every_spelling(question, wanted, others):
    for place in range(3):
        assert found([*others[:place], wanted, *others[place:]], question, 1) == [wanted]


def test_a_run_of_one_character_is_a_word_in_any_script():
    assert search_words("猫 ก") == ["猫", "ก"]
    assert search_words("เด็ก") == ["เด็", "ด็ก", "เด็ก"]


def test_duplicates_of_a_text_do_not_fill_the_top_k():
    texts = ["Cobalt is in Oslo.", "Cobalt is in\nOslo.", "Cobalt is  in Oslo. ", "Ridge likes Cobalt.", "Cats purr."]
    chunks = [Chunk(text, f"copy {number}", 0) for number, text in enumerate(texts)]

    def sources(question: str, top_k: int) -> list[str]:
        return [chunk.source for chunk in cb.BM25Retriever(chunks, top_k).retrieve(question)]

    assert sources("Is Cobalt in Oslo?", 2) == ["copy 0", "copy 3"]
    assert sources("Cobalt", 9) == ["copy 0", "copy 3", "copy 4"]


def test_nearly_the_same_texts_do_not_fill_the_top_k():
    page = "Cobalt moved to Oslo. " + " ".join(f"Word{number} follows on this page." for number in range(12))
    versions = [f"{page} Seen {date}." for date in ("Monday", "Tuesday", "Wednesday")]
    texts = [*versions, "Ridge wrote to Cobalt.", "Cats purr.", page.upper()]
    assert found(texts, "Did Cobalt move to Oslo?", 2) == [texts[3], texts[5]]
    # They come before what has no word of the question, and after all that has one.
    assert found(texts, "Did Cobalt move to Oslo?", 5) == [*versions, texts[3], texts[5]]
    assert found(texts, "Did Cobalt move to Oslo on Tuesday?", 2) == [versions[1], texts[3]]


def test_short_texts_that_differ_in_one_word_are_not_the_same():
    texts = ["The office of Ana is in Oslo.", "The office of Bo is in Lima.", "The office is closed."]
    assert found(texts, "Where is the office?", 3) == texts


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(DocumentError, match=r"install it with pip install 'cacheblend-jax\[retrieval\]'"):
        cb.BM25Retriever([])
