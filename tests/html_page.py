"""A parser for the pages that the package writes, strict where browsers are not."""

from __future__ import annotations

from collections import Counter, defaultdict
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page's elements, text and attributes, and what its drawings and tables say; fails on tags that do not match.

    Attributes:
        inside: text by the elements that it is in.
        texts: text of each element of a kind, in the order of their beginnings.
        drawings: what each drawing is called.
        tables: rows of cells, the header's too, by the title of the table or of the fold that holds it.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, int]] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.inside: defaultdict[str, str] = defaultdict(str)
        self.texts: defaultdict[str, list[str]] = defaultdict(list)
        self.drawings: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._title = ""
        self._rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append((tag, len(self.texts[tag])))
            self.texts[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        label = dict(attrs).get("aria-label") or ""
        if tag == "svg":
            self.drawings.append(label)
        elif ("role", "region") in attrs:
            self._title = label
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        opened, number = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        said = self.texts[tag][number].strip()
        if tag in ("caption", "summary"):
            self._title = said
        elif tag in ("th", "td"):
            self._rows[-1].append(said)
        elif tag == "table":
            self.tables[self._title] = self._rows

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in {tag for tag, _ in self.open}:
            self.inside[tag] += data
        for tag, number in self.open:
            self.texts[tag][number] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    def row(self, title: str, name: str) -> list[str]:
        """The cells of the row called `name` in a table, after its name."""
        return next(rest for first, *rest in self.tables[title] if first == name)
