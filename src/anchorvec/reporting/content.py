"""The parts of a report, before they are HTML or Markdown: sections of sentences, charts, tables and code.

A number is kept with its text: what is shown is rounded, and what it was made from goes into the page beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anchorvec.reporting.reading import Figure

MINUS = "\u2212"


@dataclass(frozen=True)
class Number:
    """A number as it was read or computed, and the text that is shown of it."""

    value: float
    text: str


@dataclass(frozen=True)
class Span:
    """A `value` with the ends of its interval, shown as `[low, high]`, or of its `range`, shown as `(low to high)`."""

    value: Number
    low: Number
    high: Number
    range: bool = False


Cell = str | Number | Span
"""What a field of a table holds."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; the first cell of a row is its heading. `folded`: away, until it is wanted."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Key:
    """What a colour of a chart stands for: that of a line, dashed or not, or of points."""

    name: str
    colour: str
    dash: Sequence[int] = ()
    point: bool = False


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite `spec`, what it shows in words, what its colours mean, and the same numbers as a table.

    Without a table of its own its numbers are in one of the section's.
    """

    title: str
    description: str
    spec: dict[str, Any]
    table: Table | None = None
    keys: Sequence[Key] = ()
    note: str = ""


@dataclass(frozen=True)
class Code:
    """A text to copy: commands, or a recipe, in a `language`. `folded` as tables are."""

    caption: str
    text: str
    language: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    code: Sequence[Code] = ()


@dataclass(frozen=True)
class Verdict:
    """What was found, in a sentence with its interval, and what else has to be said of it."""

    headline: Sequence[Cell]
    sentences: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True)
class Report:
    """A whole page: `left_out` names the parts without numbers, each with the reason."""

    title: str
    about: Sequence[str]
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    left_out: Sequence[str] = field(default=())


def number(value: float, digits: int = 3) -> Number:
    """`value` with so many `digits` behind the point and commas between thousands, a real minus sign before it."""
    if not math.isfinite(value):
        return Number(value, "no number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞")
    text = f"{value:,.{digits}f}"
    shown_as_zero = not text.strip("-0.,")
    return Number(value, text.removeprefix("-") if shown_as_zero else text.replace("-", MINUS))


def signed(value: float, digits: int = 3) -> Number:
    """`number`, of so many `digits`, with a plus sign before a `value` above 0."""
    found = number(value, digits)
    return Number(value, f"+{found.text}") if value > 0 and found.text[0] in "0123456789" else found


def count(value: float) -> Number:
    """A whole number: `value` with commas between thousands."""
    return number(value, 0)


def figure_cell(figure: Figure) -> Cell:
    """`figure` with its interval, where it has one."""
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return Span(number(figure.value), number(figure.low), number(figure.high))


def plain(cell: Cell) -> str:
    """The text of `cell`: `0.553 [0.521, 0.585]`."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Number):
        return cell.text
    low, high = cell.low.text, cell.high.text
    return f"{cell.value.text} ({low} to {high})" if cell.range else f"{cell.value.text} [{low}, {high}]"


def listed(words: Sequence[str]) -> str:
    """`words` as in a sentence: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `rows`, evenly spread, with the first and the last one."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
