"""The HTML page: complete, escaped, and without anything to load."""

from __future__ import annotations

from html.parser import HTMLParser

from ddqcli.inspection.html import Section, Table, write_html

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Check that elements nest; keep the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1] += data


def write(tmp_path, *sections):
    return write_html(tmp_path / "page.html", "A <title>", sections).read_text(encoding="utf-8")


def test_a_page_holds_its_text_escaped_and_its_pictures_as_they_are(tmp_path):
    table = Table(["layer", "bits"], [["a<b>&c", "4"], ["d", "8"]])
    text = write(
        tmp_path,
        Section("Size & more", ["1 < 2"], table, ['<svg class="small"><path d="M 0 0"/></svg>']),
    )
    page = Page(text)
    assert page.open == []
    assert page.cells == ["layer", "bits", "a<b>&c", "4", "d", "8"]
    assert "<title>A &lt;title&gt;</title>" in text
    assert "<h2>Size &amp; more</h2>\n<p>1 &lt; 2</p>" in text
    assert '<figure><svg class="small"><path d="M 0 0"/></svg></figure>' in text


def test_a_page_loads_nothing_and_fits_phones_light_and_dark(tmp_path):
    text = write(tmp_path, Section("Empty"))
    assert Page(text).links == []
    assert "://" not in text
    assert "@import" not in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text


def test_text_columns_are_marked(tmp_path):
    text = write(tmp_path, Section("T", table=Table(["a", "b", "c"], [["x", "y", "1"]], text=2)))
    assert '<tr><td class="text">x</td><td class="text">y</td><td>1</td></tr>' in text


def test_the_same_page_has_the_same_bytes(tmp_path):
    section = Section("T", ["text"], Table(["a"], [["1"]]), ["<svg></svg>"])
    assert write(tmp_path, section) == write(tmp_path, section)
