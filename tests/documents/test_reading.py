"""Reading documents: which files, and what text each holds."""

from __future__ import annotations

import codecs
import contextlib
import encodings
import os
import pkgutil
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.documents import DocumentError, formats, read_documents
from cacheblend_jax.documents.html_text import html_text
from cacheblend_jax.store.marker import MARKER_NAME


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
        "e.png": b"",
        "f.PNG": b"",
        "deep/g.csv": b"",
        "README": b"",
        ".hidden.png": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = read_documents(tmp_path)
    assert [document.text for document in documents] == ["text"]
    (line,) = caplog.messages
    assert line == (
        f"passed over: {str(tmp_path / 'b.txt')!r} is not UTF-8: byte 0xe9 at byte offset 3; "
        f"{str(tmp_path / 'c.txt')!r} is not text: NUL at byte offset 1, as in UTF-16 without a byte order mark; "
        "2 .png, 1 without a suffix, 1 .csv (only .txt, .md, .markdown, .html, .htm, .xhtml, .pdf or .docx files are "
        "read: convert others to text)"
    )
    (tmp_path / "a.md").unlink()
    with pytest.raises(DocumentError, match=r"no documents in .* \(passed over: .*2 \.png"):
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


def test_a_directory_that_cannot_be_entered_is_passed_over(tmp_path, monkeypatch, caplog):
    (tmp_path / "locked").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "locked" / "b.txt"):
        path.write_text("text")
    stat = Path.stat

    def locked(path, **options):
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", locked)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    assert [document.text for document in read_documents(tmp_path)] == ["text"]
    assert caplog.messages == [f"passed over: cannot read {str(tmp_path / 'locked' / 'b.txt')!r}: Permission denied"]


def test_the_home_of_a_user_that_is_unknown_does_not_exist():
    for load in (read_documents, cb.load_model):
        with pytest.raises(cb.CacheBlendError, match=r"~no-such-user/a\.txt'? (does not exist|is not)"):
            load("~no-such-user/a.txt")


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
        ("a.png", b"PNG", "suffix '.png'"),
        ("a.html", b"<p>caf\xe9", "byte 0xe9 at byte offset 6"),
        ("a.html", b"<script>x</script>", "is empty"),
        ("a.html", b"<![odd[x", "is not HTML"),
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


PAGE = """<!doctype html><html><head><title>Notes  of Ana</title><style>p { color: red }</style>
<script>var tag = "<p>not shown</p>";</script></head>
<body><nav><ul><li><a href="/">Home</a><li><p>About</p></li></ul></nav>
<h1>The <b>Cobalt</b> team</h1><p>Works in&nbsp;Oslo &amp;
Lima.<br>Since 1999.<p>Second <em>paragraph</em>.
<table><tr><th>Name<th>City<tr><td>Ana</td><td>Oslo</td></tr></table>
<pre>def f():
    return 1</pre><h2></h2><button>Click</button>The end<svg><text>not shown</text></svg>.
</body></html>"""
SHOWN = """Notes of Ana

- Home
- About

# The Cobalt team

Works in Oslo & Lima.
Since 1999.

Second paragraph.

Name | City
Ana | Oslo

def f():
    return 1

The end.
"""


def test_html_is_read_as_what_a_page_shows(tmp_path):
    for name in ("a.html", "b.HTM", "c.xhtml"):
        (tmp_path / name).write_text(PAGE)
    assert [document.text for document in cb.read_documents(tmp_path)] == [SHOWN] * 3


@pytest.mark.parametrize("charset", ["windows-1252", "iso-8859-1", "shift_jis", "utf-8", "klingon"])
def test_html_may_declare_its_encoding(tmp_path, charset):
    text = "東京" if charset == "shift_jis" else "café"
    encoding = {"klingon": "utf-8", "iso-8859-1": "windows-1252"}.get(charset, charset)
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}"><p>{text}'.encode(encoding))
    assert read_documents(tmp_path)[0].text == f"{text}\n"
    (tmp_path / "a.html").write_bytes(f'<meta charset="{charset}"><p>{text}'.encode("utf-8-sig"))
    assert read_documents(tmp_path)[0].text == f"{text}\n"


def test_whatever_codec_a_page_names_it_is_read_or_refused(tmp_path):
    names = {module.name for module in pkgutil.iter_modules(encodings.__path__)} | {"klingon"}
    path = tmp_path / "a.html"
    for name in sorted(names):
        path.write_bytes(f'<meta charset="{name}"><p>caf\\u00e9 '.encode() + b"\xe9\xff\x80" * 3)
        with contextlib.suppress(DocumentError):
            read_documents(path)
    for name in ("hex", "rot13", "zlib", "punycode", "idna", "undefined", "unicode_escape"):  # none is a page's
        path.write_text(f'<meta charset="{name}"><p>caf\u00e9 \\u00e9', encoding="utf-8")
        assert read_documents(path)[0].text == "caf\u00e9 \\u00e9\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"<>/!-[]&;= \n", "p", "li", "pre", "script", "<p>", "</p>", "<li>", "td", "#", "x"])))
def test_any_markup_is_read_or_refused(parts):
    try:
        text = html_text("".join(parts))
    except AssertionError:
        assert "<![" in "".join(parts)
    else:
        assert "\n\n\n" not in text or "pre" in parts


def pdf_of(*lines: str) -> bytes:
    """A PDF of one page for each line."""
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(lines)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(lines)} >>"]
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, line in enumerate(lines):
        drawn = f"BT /F1 12 Tf 72 720 Td ({line}) Tj ET" if line else ""
        page = f"/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R"
        objects += [f"<< {page} /Resources {font} >>", f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream"]
    content, places = "%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n"
    return f"{content}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def test_pdf_is_read_page_by_page(tmp_path, caplog):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf_of("Cobalt is in Oslo.", "Ridge is in Lima."))
    assert read_documents(tmp_path / "a.pdf")[0].text == "Cobalt is in Oslo.\n\nRidge is in Lima."
    (tmp_path / "b.pdf").write_bytes(re.sub(rb"startxref\n\d+", b"startxref\n7", pdf_of("One page.")))  # pypdf mends it
    assert read_documents(tmp_path / "b.pdf")[0].text == "One page."
    assert caplog.messages == []


def test_halves_of_surrogate_pairs_are_joined_or_unknown(tmp_path, monkeypatch):
    text = formats.Format(lambda *_: "a\ufeff\ud83d\ude00b\ud83d")
    monkeypatch.setitem(formats.FORMATS, ".txt", text)
    (tmp_path / "a.txt").touch()
    assert read_documents(tmp_path)[0].text == "a\ufeff\U0001f600b\ufffd"


def test_pdf_that_cannot_be_read_says_why(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    path = tmp_path / "a.pdf"
    for content, why in ((b"%PDF", "is not a PDF that can be read: "), (pdf_of(""), "has no text, only pictures")):
        path.write_bytes(content)
        with pytest.raises(DocumentError, match=f"a.pdf' {why}") as error:
            read_documents(path)
        assert "\n" not in str(error.value)
    writer = pypdf.PdfWriter()
    writer.add_blank_page(72, 72)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(path)
    with pytest.raises(DocumentError, match="is encrypted: expected a PDF without a password"):
        read_documents(path)


def test_docx_is_read_with_headings_and_tables_in_place(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("Notes", 0)
    document.add_paragraph("Cobalt is in Oslo.")
    document.add_heading("Offices", 2)
    table = document.add_table(2, 2)
    for cell, text in zip(
        (cell for row in table.rows for cell in row.cells), ("Name", "City", "Ana", "Oslo"), strict=True
    ):
        cell.text = text
    document.add_paragraph("")
    document.add_paragraph("The end.")
    document.save(tmp_path / "a.docx")
    text = read_documents(tmp_path)[0].text
    assert text == "# Notes\n\nCobalt is in Oslo.\n\n## Offices\n\nName | City\nAna | Oslo\n\nThe end."


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
MC = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'


def run(text: str) -> str:
    return f"<w:r><w:t>{text}</w:t></w:r>"


def control(content: str, properties: str = "") -> str:
    return f"<w:sdt {W}><w:sdtPr>{properties}</w:sdtPr><w:sdtContent>{content}</w:sdtContent></w:sdt>"


def box(text: str) -> str:
    return f"<w:txbxContent><w:p>{run(text)}</w:p></w:txbxContent>"


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        (control(f"<w:p>{run('Held')}</w:p>"), "Held"),
        (f"<w:p {W}>{run('A ')}{control(run('held'))}{run(' name')}</w:p>", "A held name"),
        (control(f"<w:p>{run('Click here')}</w:p>", "<w:showingPlcHdr/>"), ""),
        (
            control(
                f"<w:p>{run('Offices 3')}</w:p>",
                '<w:docPartObj><w:docPartGallery w:val="Table of Contents"/></w:docPartObj>',
            ),
            "",
        ),
        (f"<w:p {W}>{run('New: ')}<w:ins>{run('inserted')}</w:ins><w:moveFrom>{run('moved')}</w:moveFrom></w:p>",
         "New: inserted"),
        (f"<w:p {W}>{run('Is ')}<w:del><w:r><w:delText>not </w:delText></w:r>{run('no')}</w:del>{run('here')}</w:p>",
         "Is here"),
        (f"<w:p {W}><w:hyperlink>{run('Link')}</w:hyperlink><w:fldSimple>{run(' 7')}</w:fldSimple></w:p>", "Link 7"),
        (f'<w:p {W}><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t>'
         f'<w:br w:type="page"/><w:noBreakHyphen/></w:r></w:p>', "a\tb\nc-"),
        (f"<w:p {W} {MC}>{run('Before')}<w:r><mc:AlternateContent><mc:Choice>{box('Boxed')}</mc:Choice><mc:Fallback>"
         f"{box('Boxed')}</mc:Fallback></mc:AlternateContent></w:r></w:p>", "Before\n\nBoxed"),
        (f"<w:ins {W}><w:p>{run('Whole')}</w:p></w:ins>", "Whole"),
    ],
)  # fmt: skip
def test_docx_is_read_whatever_surrounds_its_text(tmp_path, xml, text):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.element.body.insert(0, docx.oxml.parse_xml(xml))
    document.add_paragraph("The end.")
    document.save(tmp_path / "a.docx")
    assert read_documents(tmp_path)[0].text == f"{text}\n\nThe end.".lstrip()


def test_cells_of_docx_come_once_in_each_row_with_the_tables_in_them(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    table = document.add_table(3, 3)
    table.cell(0, 0).merge(table.cell(0, 2)).text = "Offices"
    table.cell(1, 0).merge(table.cell(2, 0)).text = "Ana"
    table.cell(1, 1).text = "Oslo"
    inner = table.cell(1, 2).add_table(1, 2)
    inner.cell(0, 0).text, inner.cell(0, 1).text = "Ridge", "Lima"
    table.cell(2, 1).text = "Rome"
    gone = table.add_row()
    gone.cells[0].text = "Gone"
    gone._tr.get_or_add_trPr().append(docx.oxml.parse_xml(f"<w:del {W}/>"))
    document.save(tmp_path / "a.docx")
    assert read_documents(tmp_path)[0].text == "Offices\nAna | Oslo | Ridge | Lima\nAna | Rome | "


def test_docx_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    docx = pytest.importorskip("docx")
    path = tmp_path / "a.docx"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(DocumentError, match=r"a.docx' is not a .docx file that can be read: ") as error:
        read_documents(path)
    assert "\n" not in str(error.value)
    docx.Document().save(path)
    monkeypatch.setattr("cacheblend_jax.documents.office_text.MOST_UNPACKED", 1000)
    with pytest.raises(DocumentError, match=r"unpacks to .* bytes, expected at most 1000"):
        read_documents(path)


def test_what_needs_a_package_is_passed_over_with_the_command_that_installs_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    for name in ("a.pdf", "b.docx", "c.pdf"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.txt").write_text("text")
    assert len(read_documents(tmp_path)) == 1
    install = "pip install 'cacheblend-jax[documents]'"
    assert caplog.messages == [f"passed over: 2 .pdf, 1 .docx (to read them: {install})"]
    with pytest.raises(DocumentError, match=r"c\.pdf' needs the package pypdf: install it with pip install") as error:
        read_documents(tmp_path / "c.pdf")
    assert str(error.value).endswith(install)
