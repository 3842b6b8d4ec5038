"""The HTML page: complete, escaped, and without anything to load."""

from __future__ import annotations

from parsed_page import Page

from ddqcli.inspection.html import Fact, Picture, Section, Table, write_html

SVG = '<svg role="img" aria-label="A"><path d="M 0 0"/></svg>'


def write(tmp_path, *sections):
    return write_html(tmp_path / "page.html", "A <title>", sections).read_text(encoding="utf-8")


def test_a_page_holds_its_text_escaped_and_its_pictures_as_they_are(tmp_path):
    text = write(
        tmp_path,
        Section(
            "Size & more",
            ["1 < 2"],
            Table(["layer", "bits"], [["a<b>&c", "4"], ["d", "8"]]),
            [Picture(SVG, "x < y")],
            [Fact("<size>", "1 & 2", "<3")],
            ["<warned>"],
        ),
    )
    page = Page(text)
    assert page.all("th") + page.all("td") == ["layer", "bits", "a<b>&c", "4", "d", "8"]
    assert page.all("title") == page.all("h1") == ["A <title>"]
    assert page.all("h2") == ["Size & more"]
    assert page.all("p") == ["1 < 2", "Warning: <warned>."]
    assert page.all("dt") == ["<size>"]
    assert page.all("dd") == ["1 & 2", "<3"]
    assert page.all("figcaption") == ["x < y"]
    assert f"<figure>{SVG}<figcaption>" in text


def test_a_wide_picture_and_a_tall_one_take_their_room(tmp_path):
    pictures = [Picture(SVG, wide=True, rows=2), Picture(SVG, rows=3), Picture(SVG)]
    text = write(tmp_path, Section("T", pictures=pictures))
    assert f'<figure class="wide">{SVG}</figure>' in text
    assert f'<figure style="grid-row: span 3">{SVG}</figure>' in text
    assert f"<figure>{SVG}</figure>" in text


def test_a_bar_has_the_share_of_its_row(tmp_path):
    text = write(
        tmp_path,
        Section("T", table=Table(["a", "b"], [["x", "1"], ["y", "3"]], bars={1: [0.125, 1]})),
    )
    assert '<td class="bar" style="--share: 12.5%">1</td>' in text
    assert '<td class="bar" style="--share: 100.0%">3</td>' in text


def test_a_table_scrolls_in_its_own_box_that_the_keyboard_reaches(tmp_path):
    text = write(tmp_path, Section("My <T>", table=Table(list("abcde"), [])))
    box = '<div class="table" role="region" aria-label="My &lt;T&gt;" tabindex="0"><table>'
    assert box in text
    assert ".table { overflow-x: auto;" in text


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
    section = Section("T", ["text"], Table(["a"], [["1"]]), [Picture(SVG)])
    assert write(tmp_path, section) == write(tmp_path, section)
