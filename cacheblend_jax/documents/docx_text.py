"""The text of a Word document as its XML has it: python-docx leaves out content controls, insertions and text boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

BETWEEN_CELLS = " | "
W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
PARAGRAPH, TABLE, ROW, CELL, TEXT, BREAK, CONTROL, TEXT_BOX = (
    W + name for name in ("p", "tbl", "tr", "tc", "t", "br", "sdt", "txbxContent")
)
CHARACTERS = {W + "tab": "\t", W + "ptab": "\t", W + "cr": "\n", W + "noBreakHyphen": "-"}
# What is deleted, what has been moved elsewhere, readings above characters, and a second form of what comes in a first.
UNSHOWN = frozenset(
    (W + "del", W + "moveFrom", W + "rt", "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback")
)
PROPERTIES = frozenset((W + "pPr", W + "rPr"))  # they have tab stops, which are called as tabs are


def docx_blocks(document: Any) -> Iterator[str]:
    """Yields the paragraphs, headings as in Markdown, and the tables of python-docx's `Document`, in order.

    Tracked changes count as accepted. A table of contents is left out: its lines are the headings once more.
    """
    from docx.text.paragraph import Paragraph

    def heading(paragraph: Any) -> str:
        style = Paragraph(paragraph, document).style
        name = style.name or "" if style is not None else ""
        level = "1" if name == "Title" else name.removeprefix("Heading ")
        return f"{'#' * min(int(level), 6)} " if level.isdecimal() else ""

    return _blocks(document.element.body, heading)


def _blocks(parent: Any, heading: Callable[[Any], str]) -> Iterator[str]:
    for element in _shown(parent, (PARAGRAPH, TABLE)):
        if element.tag == TABLE:
            yield "\n".join(_rows(element))
            continue
        text = "".join(_characters(element))
        if text.strip():
            yield heading(element) + text
        for box in _shown(element, (TEXT_BOX,)):
            yield from _blocks(box, heading)


def _shown(parent: Any, tags: tuple[str, ...]) -> Iterator[Any]:
    """Yields the elements with these tags, none of which is in another one, whatever surrounds them."""
    for element in parent:
        if element.tag in tags:
            yield element
        elif element.tag not in UNSHOWN and not _is_filler(element):
            yield from _shown(element, tags)


def _is_filler(element: Any) -> bool:
    """Returns whether an element is a content control that nobody has filled in, or a table of contents."""
    if element.tag != CONTROL:
        return False
    gallery = element.find(f"{W}sdtPr/{W}docPartObj/{W}docPartGallery")
    is_contents = gallery is not None and gallery.get(W + "val") == "Table of Contents"
    return is_contents or element.find(f"{W}sdtPr/{W}showingPlcHdr") is not None


def _characters(parent: Any) -> Iterator[str]:
    """Yields the text of a paragraph, but not that of text boxes anchored in it."""
    for element in parent:
        if element.tag == TEXT:
            yield element.text or ""
        elif element.tag in CHARACTERS:
            yield CHARACTERS[element.tag]
        elif element.tag == BREAK:
            yield "\n" if element.get(W + "type", "textWrapping") == "textWrapping" else ""
        elif element.tag not in UNSHOWN | PROPERTIES | {TEXT_BOX} and not _is_filler(element):
            yield from _characters(element)


def _rows(table: Any) -> Iterator[str]:
    """Yields a table's rows; what is merged from cells of several rows comes in each, and else once."""
    above: dict[int, str] = {}
    for row in _shown(table, (ROW,)):
        if row.find(f"{W}trPr/{W}del") is not None:
            continue
        texts, column = {}, 0
        for cell in _shown(row, (CELL,)):
            merge, span = (cell.find(f"{W}tcPr/{W}{name}") for name in ("vMerge", "gridSpan"))
            goes_on = merge is not None and merge.get(W + "val", "continue") == "continue"
            own = " ".join(" ".join(block.split()) for block in _blocks(cell, lambda _: ""))
            texts[column] = above.get(column, own) if goes_on else own
            column += 1 if span is None else int(span.get(W + "val", 1))
        yield BETWEEN_CELLS.join(texts.values())
        above = texts
