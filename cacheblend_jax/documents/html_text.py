"""The text of an HTML page: paragraphs apart, headings as in Markdown, and nothing of scripts, styles and forms."""

from __future__ import annotations

import codecs
import re
from html.parser import HTMLParser

# None of their content is shown to who reads the page.
UNSHOWN = frozenset("script style template noscript svg math iframe object select textarea button datalist".split())
HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
PARAGRAPHS = frozenset(
    "address article aside blockquote body dd details dialog div dl dt fieldset figcaption figure footer form header "
    "hgroup hr main nav ol p pre search section summary table tbody tfoot thead title ul".split()
)
LINES = frozenset("br li tr option".split())
CELLS = frozenset("td th".split())
BETWEEN_CELLS = " | "
SPACES = re.compile(r"[ \t\n\r\f\xa0]+")
ITEM = "- "
META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
META_BYTES = 1024  # browsers look no further
# Encodings that are Python's own, not a page's.
NO_CHARSETS = frozenset("idna mbcs oem punycode raw-unicode-escape undefined unicode-escape".split())


def html_text(markup: str) -> str:
    """Returns the text that a page shows, and its title. A page that is not well formed is read as far as it goes."""
    page = _Page()
    page.feed(markup)
    page.close()
    return page.text()


def declared_charset(content: bytes) -> str | None:
    """Returns the encoding that a page's `<meta>` names; `None` where it names none of a text that Python knows."""
    match = META_CHARSET.search(content, 0, META_BYTES)
    if match is None:
        return None
    name = match[1].decode("ascii")
    try:
        known = codecs.lookup(name).name
        if known.replace("_", "-") in NO_CHARSETS:
            return None
        "a".encode(known)  # so that it is of text: hex and zlib are of bytes
    except LookupError:
        return None
    # Who could read this far did not read UTF-16; and browsers take Latin-1 for what Windows calls so.
    return {"iso8859-1": "cp1252", "ascii": "cp1252"}.get(known, "utf-8" if known.startswith("utf-16") else known)


class _Page(HTMLParser):
    """Collects text; `_lines` holds what is done, `_line` what stands on the line that is being read."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line: list[str] = []
        self._unshown: list[str] = []
        self._preformatted = 0

    def text(self) -> str:
        self._end_line()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip("\n") + "\n"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in UNSHOWN:
            self._unshown.append(tag)
        elif tag in HEADINGS or tag in PARAGRAPHS:
            if self._line != [ITEM]:  # a paragraph that begins an item is the item's
                self._end_paragraph()
            self._line += [f"{HEADINGS[tag]} "] if tag in HEADINGS else []
        elif tag in LINES:
            self._end_line()
            self._line += [ITEM] if tag == "li" else []
        elif tag in CELLS and self._line:
            self._line.append(BETWEEN_CELLS)
        self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in UNSHOWN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._unshown:
            del self._unshown[self._unshown.index(tag) :]
        elif tag in HEADINGS or tag in PARAGRAPHS:
            self._end_paragraph()
        elif tag in LINES and tag != "br":
            self._end_line()
        if tag == "pre":
            self._preformatted = max(self._preformatted - 1, 0)

    def handle_data(self, data: str) -> None:
        if self._unshown:
            return
        if self._preformatted:
            *whole, rest = data.replace("\r\n", "\n").split("\n")
            for line in whole:
                self._line.append(line)
                self._lines.append("".join(self._line).rstrip())
                self._line = []
            self._line.append(rest)
        else:
            self._line.append(SPACES.sub(" ", data))

    def _end_line(self) -> None:
        line = "".join(self._line)
        line = line.rstrip() if self._preformatted else SPACES.sub(" ", line).strip()
        if line.strip(" #-|"):  # not the beginning of a heading, an item or a row without text
            self._lines.append(line)
        self._line = []

    def _end_paragraph(self) -> None:
        self._end_line()
        if self._lines and self._lines[-1]:
            self._lines.append("")
