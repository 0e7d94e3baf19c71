"""The report: one file that asks for nothing else, in which every text is text."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from inspections import CHECK_LAYER, made_inspection

import cacheblend_jax as cb
from cacheblend_jax.evaluation.html_report import LEVELS, report_html, save_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = (
    "</span><script>alert(1)</script>",
    '" onmouseover="alert(2)',
    "<img src=x>",
    "&amp;",
    "\x00",
    "\udcff",
    "'>",
)


class Page(HTMLParser):
    """A page's elements, each with its attributes and the text in it; fails where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data):
        for number in self._open:
            self.elements[number][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        found = [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]
        return [each for each in found if wanted.items() <= each[0].items()]

    def tokens(self) -> list[tuple[dict[str, str | None], str]]:
        """The prompt's tokens: the elements of the texts that stand before the answers."""
        answers = next(number for number, each in enumerate(self.elements) if each[0] == "aside")
        key = next(number for number, each in enumerate(self.elements) if each[1].get("class") == "text")
        return [(each[1], "".join(each[2])) for each in self.elements[key:answers] if each[0] == "span"]


@pytest.fixture(scope="module")
def inspection():
    return made_inspection((40, 60))


@pytest.fixture(scope="module")
def page(inspection) -> Page:
    return Page(report_html(inspection))


def test_every_token_is_there_with_its_text(inspection, page):
    assert [text for _, text in page.tokens()] == list(inspection.texts)


def test_tokens_are_shaded_by_their_highest_deviation_and_marked_where_recomputed(inspection, page):
    highest = inspection.deviation.max(axis=0)
    levels = []
    for number, (attributes, _) in enumerate(page.tokens()):
        classes = attributes["class"].split()
        if not inspection.candidate[number]:
            assert not classes
            continue
        levels.append((highest[number], int(classes[0].removeprefix("d"))))
        assert ("r" in classes) == inspection.recomputed[CHECK_LAYER + 1 :, number].any()
        layer, value = re.fullmatch(r"layer (\d+): (\S+)", attributes["title"]).groups()
        assert int(layer) == inspection.deviation[:, number].argmax()
        assert float(value) == pytest.approx(highest[number], rel=1e-2)
    levels.sort()
    assert [level for _, level in levels] == sorted(level for _, level in levels)
    assert levels[-1][1] == LEVELS - 1


def test_the_values_of_all_layers_are_in_the_page(inspection, page):
    ((attributes, text),) = page.all("script", id="values")
    shares = np.frombuffer(base64.b64decode(text), "<u2").reshape(inspection.deviation.shape) / 65535
    values = float(attributes["data-largest"]) * shares**2
    np.testing.assert_allclose(values, inspection.deviation, rtol=1e-3, atol=1e-6)
    last = [attributes.get("data-last") for attributes, _ in page.tokens()]
    for number in np.flatnonzero(inspection.candidate):
        computed = inspection.recomputed[:, number]
        assert int(last[number]) == (-1 if not computed.any() else np.flatnonzero(computed).max())
    assert last[0] is None


def test_the_answers_of_the_four_modes_stand_beside_the_prompt(page):
    cards = [text.split()[0] for attributes, text in page.all("article", **{"class": "card"})]
    assert cards == ["full", "prefix", "reuse", "blend", "Distance"]
    answers = [text for _, text in page.all("article", **{"class": "card"})]
    assert all("Oslo" in text for text in answers[:4])
    assert ["the same answer as full" in text for text in answers[:4]] == [False, True, False, True]


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(page):
    loading = {"src", "href", "srcset", "data", "action", "formaction", "poster", "style", "background"}
    for tag, attributes, _ in page.elements:
        assert not loading & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    ((_, style),), scripts = page.all("style"), page.all("script")
    assert not re.search(r"url\(|@import|https?:", style)
    code = [text for attributes, text in scripts if "type" not in attributes]
    assert len(scripts) == 2
    assert not re.search(r"https?:|fetch|XMLHttp|import|innerHTML|eval|document\.write", code[0])
    ((policy, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; ")
    for text, kind in ((style, "style"), (code[0], "script")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy["content"]


def test_hostile_texts_stay_text(tmp_path):
    inspection = made_inspection((7, 7), ("<b>a</b>.md 0", '"x".md\udcff 1'), words=HOSTILE, answer=HOSTILE[0])
    save_report(inspection, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    printed = {"\x00": "␀", "\udcff": "\ufffd"}
    assert [text for _, text in page.tokens()] == [printed.get(text, text) for text in inspection.texts]
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert [text.split(" ")[0] for _, text in page.all("h2")][1:3] == ["<b>a</b>.md", '"x".md\ufffd']
    assert HOSTILE[0] in page.all("article", **{"class": "card"})[0][1]


def test_blank_and_incomplete_tokens_can_be_seen():
    tokens = Page(report_html(made_inspection(words=("a", "\n\n", "", " ")))).tokens()
    signs = [{"n", "e"} & set(attributes["class"].split()) for attributes, _ in tokens[4:8]]
    assert signs == [set(), {"n"}, {"e"}, set()]


def test_six_thousand_tokens_of_thirty_layers_are_a_file_of_a_megabyte_or_so():
    html = report_html(made_inspection((500,) * 12, layers=30))
    assert 500_000 < len(html) < 1_500_000
    assert len(Page(html).tokens()) == 6005


def test_nothing_stored_and_nothing_between_chunks_is_no_error():
    inspection = made_inspection((4,))
    inspection.candidate[:] = False
    inspection.recomputed[:] = True
    inspection.deviation[:] = 0
    page = Page(report_html(inspection))
    assert "computed in every layer" in page.all("h2")[1][1]
    assert "attention between chunks" not in page.all("table")[0][1]


def test_a_report_that_cannot_be_written_is_named(inspection, tmp_path):
    with pytest.raises(cb.CacheBlendError, match=r"cannot write the report .*nowhere/report\.html: No such file"):
        save_report(inspection, tmp_path / "nowhere" / "report.html")
