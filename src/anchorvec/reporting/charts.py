"""The charts, as Vega-Lite specs made with altair. Colours are the page's own variables, which follow its scheme.

Widths are those of the place where a chart stands. What colours mean is told beside the chart, in HTML, where names
of any length wrap; names beside the rows of a chart are wrapped here.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError
from anchorvec.reporting.reading import unlike

if TYPE_CHECKING:
    import altair as alt

COLOURS = 8
"""How many colours the page has; further series have them again, dashed."""

_ROW_PIXELS = 30
_LINE_HEIGHT = 210
_NAME_CHARACTERS = 16
"""After so many a name is wrapped: on a phone half of the width is left for what is drawn."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A curve: its `points` (x, y), and how it looks."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: Sequence[int] = ()


@dataclass(frozen=True)
class Dot:
    """A row of a chart of values: `value`, with the ends of its interval and `others` that it is the mean of."""

    name: str
    value: float
    colour: str
    low: float | None = None
    high: float | None = None
    others: Sequence[float] = ()
    hollow: bool = False


def colour_of(index: int) -> str:
    """The page's variable for the colour of the series `index`."""
    return f"var(--series-{index % COLOURS + 1})"


def dash_of(index: int) -> tuple[int, ...]:
    """How the line of the series `index` is dashed: where its colour was taken before."""
    return ((), (6, 3), (2, 3))[min(2, index // COLOURS)]


def require_extra() -> None:
    """Raise AnchorvecError if the packages for charts are not installed."""
    import importlib.util

    for module, package in (("altair", "altair"), ("vl_convert", "vl-convert-python"), ("jinja2", "jinja2")):
        if importlib.util.find_spec(module) is None:
            raise AnchorvecError(f"a report needs the package {package}: pip install 'anchorvec[report]'")


def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in the versions that altair writes for, as one script without any address."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub has no defaults


def line_chart(lines: Sequence[Line], *, x: str, y: str, zero: bool = False) -> dict[str, Any]:
    """A chart of `lines`, whose axes are called `x` and `y`; the one of values from 0 on if `zero`.

    Points that are no finite numbers are left out.
    """
    import altair as alt

    layers: list[alt.Chart] = []
    for line in lines:
        rows = _point_rows(line)
        few = len(rows) <= 30
        layers.append(
            alt.Chart(_data(rows))
            .mark_line(
                color=line.colour,
                strokeDash=list(line.dash) or [1, 0],
                strokeWidth=2,
                point=alt.OverlayMarkDef(color=line.colour, size=28 if few else 120, opacity=1 if few else 0),
            )
            .encode(
                x=alt.X("x:Q", title=x, axis=_few_ticks(x)),
                y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=zero), axis=_side_axis()),
                tooltip=_tooltip(x, y),
            )
        )
    return _spec(alt.layer(*layers), height=_LINE_HEIGHT)


def dot_chart(dots: Sequence[Dot], *, x: str, domain: tuple[float, float], zero_rule: bool = False) -> dict[str, Any]:
    """A row for each of `dots`, with interval and single values, over the axis `x`, which shows `domain`.

    `zero_rule`: with a line at 0, for differences.
    """
    import altair as alt

    rows = _dot_rows(dots)
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    across = alt.X("value:Q", title=x, scale=scale, axis=_few_ticks(x))
    colour = alt.Color("colour:N", scale=None, legend=None)
    base = alt.Chart(_data(rows)).encode(y=_down(rows), color=colour)
    intervals = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5)
    points = base.mark_point(size=90, strokeWidth=2, opacity=1)
    layers = [
        intervals.encode(x=alt.X("low:Q", title=x, scale=scale, axis=_few_ticks(x)), x2="high:Q"),
        points.encode(x=across, fill=alt.Fill("fill:N", scale=None), tooltip=_tooltip(x, None)),
    ]
    singles = [{"name": row["name"], "value": v, "colour": row["colour"]} for row in rows for v in row["others"]]
    if singles:
        ticks = alt.Chart(_data(singles)).mark_tick(size=14, thickness=2, opacity=0.6)
        layers.insert(1, ticks.encode(y=_down(rows), x=across, color=colour))
    if zero_rule:
        rule = alt.Chart(_data([{"value": 0}])).mark_rule(color="var(--muted)", strokeDash=[4, 3])
        layers.insert(0, rule.encode(x=across))
    return _spec(alt.layer(*layers), height=_height(rows))


def bar_chart(dots: Sequence[Dot], *, x: str) -> dict[str, Any]:
    """A bar from 0 on for each of `dots`, over the axis `x`."""
    import altair as alt

    rows = _dot_rows(dots)
    bars = alt.Chart(_data(rows)).mark_bar(size=14, cornerRadiusEnd=3)
    encoded = bars.encode(
        x=alt.X("value:Q", title=x, axis=_few_ticks(x)),
        y=_down(rows),
        color=alt.Color("colour:N", scale=None, legend=None),
        tooltip=_tooltip(x, None),
    )
    return _spec(encoded, height=_height(rows))


def scatter_chart(lines: Sequence[Line], *, x: str, y: str) -> dict[str, Any]:
    """The points of `lines`, those of a dashed one joined in their order, over the axes `x` and `y`."""
    import altair as alt

    layers: list[alt.Chart] = []
    for line in lines:
        base = alt.Chart(_data(_point_rows(line))).encode(
            x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, padding=12), axis=_few_ticks(x)),
            y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=False, padding=8), axis=_side_axis()),
        )
        if line.dash:
            path = base.mark_line(color=line.colour, strokeWidth=1.5, strokeDash=list(line.dash))
            layers.append(path.encode(order=alt.Order("place:Q")))
        else:
            points = base.mark_point(size=90, filled=True, opacity=1, color=line.colour)
            layers.append(points.encode(tooltip=_tooltip(x, y)))
    return _spec(alt.layer(*layers), height=_LINE_HEIGHT)


def wrapped(name: str) -> str:
    """`name` on lines of few characters, for the side of a chart."""
    return "\n".join(textwrap.wrap(name.replace("Stage ", "Stage\u00a0"), _NAME_CHARACTERS)) or name


def _point_rows(line: Line) -> list[dict[str, Any]]:
    """The points of `line` that are finite numbers."""
    finite = [(a, b) for a, b in line.points if math.isfinite(a) and math.isfinite(b)]
    return [{"x": a, "y": b, "name": line.name, "place": i} for i, (a, b) in enumerate(finite)]


def _dot_rows(dots: Sequence[Dot]) -> list[dict[str, Any]]:
    """The rows of `dots` that are finite numbers, under names that differ."""
    finite = [dot for dot in dots if math.isfinite(dot.value)]
    names = unlike([wrapped(dot.name) for dot in finite])
    return [_dot_row(dot, name) for dot, name in zip(finite, names, strict=True)]


def _dot_row(dot: Dot, name: str) -> dict[str, Any]:
    ends = [end for end in (dot.low, dot.high) if end is not None and math.isfinite(end)]
    low, high = ends if len(ends) == 2 else (None, None)
    return {
        "name": name,
        "value": dot.value,
        "low": low,
        "high": high,
        "others": [value for value in dot.others if math.isfinite(value)],
        "colour": dot.colour,
        "fill": "var(--surface)" if dot.hollow else dot.colour,
    }


def _down(rows: Sequence[Row]) -> "alt.Y":
    """The names of `rows`, in their order, from above."""
    import altair as alt

    axis = alt.Axis(labelPadding=6, domain=False, grid=False, ticks=False)
    return alt.Y("name:N", sort=[row["name"] for row in rows], title=None, axis=axis)


def _height(rows: Sequence[Row]) -> int:
    """The height of all `rows`, each of which has room for the lines of the longest name."""
    lines = max((row["name"].count("\n") + 1 for row in rows), default=1)
    return max(1, len(rows)) * max(_ROW_PIXELS, 15 * lines + 8)


def _data(rows: Sequence[Row]) -> "alt.InlineData":
    import altair as alt

    return alt.InlineData(values=[dict(row) for row in rows])


def _side_axis() -> "alt.Axis":
    """An axis of values, written with as many digits as they have."""
    import altair as alt

    return alt.Axis(tickCount=5, format=".6~r")


def _few_ticks(title: str) -> "alt.Axis":
    """An axis that a phone has room for; large counts are written short, as 300k."""
    import altair as alt

    counts = any(word in title for word in ("token", "step"))
    label = "datum.value < 1000 ? datum.label : format(datum.value, '~s')" if counts else "datum.label"
    return alt.Axis(tickCount=4, labelOverlap=True, labelSeparation=8, titleAnchor="start", labelExpr=label)


def _tooltip(x: str, y: str | None) -> "list[alt.Tooltip]":
    import altair as alt

    if y is None:
        return [alt.Tooltip("name:N", title="of"), alt.Tooltip("value:Q", title=x)]
    return [alt.Tooltip("name:N", title="of"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]


def _spec(chart: Any, *, height: int) -> dict[str, Any]:
    """The Vega-Lite spec of `chart`, as wide as its place, in the colours of the page."""
    axis = {
        "labelColor": "var(--ink)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelLimit": 0,
        "titleLimit": 0,
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    spec: dict[str, Any] = (
        chart.properties(width="container", height=height, background="transparent")
        .configure(
            lineBreak="\n",
            font="system-ui, sans-serif",
            aria=False,
            padding={"left": 2, "top": 2, "right": 14, "bottom": 2},
        )
        .configure_view(stroke=None)
        .configure_axis(**axis)
        .to_dict()
    )
    spec.pop("$schema")
    return spec
