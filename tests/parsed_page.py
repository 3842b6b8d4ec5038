"""A page of ddq as its reader meets it, parsed by html.parser alone."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Content of a page, by the position of its start in the page.

    Checks that all elements nest.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.links: list[str] = []  # that would be loaded
        self.svgs: list[dict[str, str | None]] = []  # attributes of each
        self.places: dict[str, list[int]] = {}  # tag -> number of elements begun before each
        self.texts: dict[str, list[str]] = {}  # tag -> text of each
        self.begun = 0
        self.feed(text)
        self.close()
        assert self.open == []

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            value
            for name, value in attrs
            if name in {"src", "href"} and value and not value.startswith("#")
        ]
        self.places.setdefault(tag, []).append(self.begun)
        self.texts.setdefault(tag, []).append("")
        self.begun += 1
        if tag == "svg":
            self.svgs.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[str]:
        """Return the text of each element `tag`, without that of elements inside it."""
        return self.texts.get(tag, [])

    def row_of(self, cell: str, length: int) -> list[str]:
        """Return the cells from the first one with this text."""
        start = self.all("td").index(cell)
        return self.all("td")[start : start + length]
