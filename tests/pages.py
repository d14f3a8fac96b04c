"""Pages as a reader finds them: headings, tables, charts and code of an HTML file, for the tests of the report."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "line", "circle", "br", "img", "input"}
"""Elements that have no end."""


@dataclass
class Element:
    """An element of a page: its attributes, and its texts and elements in their order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    parts: list["Element | str"] = field(default_factory=list)

    def __iter__(self) -> Iterator["Element"]:
        """The element itself and all that are in it, from above."""
        yield self
        for part in self.parts:
            if isinstance(part, Element):
                yield from part

    def all(self, *tags: str) -> list["Element"]:
        """The elements in this one with one of `tags`."""
        return [element for element in self if element.tag in tags and element is not self]

    def get(self, tag: str) -> "Element":
        """The first element in this one with `tag`."""
        return self.all(tag)[0]

    @property
    def text(self) -> str:
        """All text in it, without what is in scripts; white space as one space."""
        own = [part if isinstance(part, str) else part.text for part in self.parts if not _is_script(part)]
        return " ".join("".join(own).split())

    @property
    def raw(self) -> str:
        """Its own text, as it is."""
        return "".join(part for part in self.parts if isinstance(part, str))


def _is_script(part: Element | str) -> bool:
    return isinstance(part, Element) and part.tag in ("script", "style")


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("page")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].parts.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"a stray </{tag}>"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


@dataclass
class PageTable:
    """A table: what stands over its columns, the texts of each row, and the numbers behind these texts."""

    columns: list[str]
    rows: list[list[str]]
    numbers: list[list[list[float]]]

    def row(self, *start: str) -> list[str]:
        """The only row that begins with these texts."""
        [row] = [row for row in self.rows if row[: len(start)] == list(start)]
        return row

    def numbers_of(self, column: str, *start: str) -> list[float]:
        """The numbers in a cell: of the column, in the only row that begins with these texts."""
        row = self.rows.index(self.row(*start))
        return self.numbers[row][self.columns.index(column)]


@dataclass
class PageChart:
    """A chart: what it is said to show to whom does not see it, the meaning of its colours, and its specification."""

    label: str
    keys: list[str]
    spec: dict[str, Any]

    @property
    def values(self) -> list[dict[str, Any]]:
        """The rows that are drawn, of all its layers."""
        return [row for rows in self.spec["datasets"].values() for row in rows]


class Page:
    """The page in `file`."""

    def __init__(self, file: Path) -> None:
        self.source = file.read_text(encoding="utf-8")
        parser = _Parser()
        parser.feed(self.source)
        parser.close()
        assert parser.open == [parser.root], "an element without its end"
        self.root = parser.root
        self.title = self.root.get("h1").text
        self.sections = {section.get("h2").text: section for section in self.root.all("section")}

    @property
    def verdict(self) -> list[str]:
        """The sentences of the verdict, the headline first."""
        return [element.text for element in self.sections["Verdict"].all("p", "li")]

    def tables(self, section: str) -> dict[str, PageTable]:
        """The tables of a section by their captions."""
        return {table.get("caption").text: _table(table) for table in self.sections[section].all("table")}

    def charts(self, section: str) -> dict[str, PageChart]:
        """The charts of a section by their titles."""
        return {figure.get("figcaption").text: _chart(figure) for figure in self.sections[section].all("figure")}

    def code(self, section: str) -> list[str]:
        """The texts to copy of a section."""
        return [element.get("code").raw for element in self.sections[section].all("pre")]


def _table(table: Element) -> PageTable:
    rows = [row.all("th", "td") for row in table.get("tbody").all("tr")]
    return PageTable(
        [cell.text for cell in table.get("thead").all("th")],
        [[cell.text for cell in row] for row in rows],
        [[[float(number.attributes["value"]) for number in cell.all("data")] for cell in row] for row in rows],
    )


def _chart(figure: Element) -> PageChart:
    [place] = [element for element in figure if element.attributes.get("role") == "img"]
    [spec] = [script for script in figure.all("script") if script.attributes["id"] == place.attributes["data-spec"]]
    keys = [key.text for one in figure.all("ul") for key in one.all("li")]
    return PageChart(place.attributes["aria-label"], keys, json.loads(spec.raw))
