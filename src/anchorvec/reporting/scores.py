"""The sections of the scores: what each system scored, by kind of task, and by how much they differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from anchorvec.evaluation.tasks import headings
from anchorvec.reporting.charts import Dot, colour_of, dot_chart
from anchorvec.reporting.content import Cell, Chart, Section, Table, listed, number, plain
from anchorvec.reporting.differences import ALL, MOST_SETS
from anchorvec.reporting.reading import Change, Source
from anchorvec.reporting.systems import System, spread, systems_of
from anchorvec.reporting.verdict import change_span, p_cell


@dataclass(frozen=True)
class Panel:
    """What a chart, and a column of the table, is of: a test set, or all sets of a kind."""

    title: str
    tasks: Sequence[str]
    measure: str

    def of(self, system: System) -> list[float]:
        """The average score of each seed of `system`; empty where it lacks a set."""
        if not all(task in system.tasks() for task in self.tasks):
            return []
        return [fmean(of_seed[task].main.value for task in self.tasks) for of_seed in system.seeds]

    def cell(self, system: System) -> Cell:
        """The score of `system` with its interval or range."""
        if len(self.tasks) == 1:
            return system.cell(self.tasks[0])
        return spread(self.of(system))


def scores_section(sources: Sequence[Source]) -> Section | None:
    """What each system of `sources` scored, by kind; None where nothing was scored."""
    systems = [system for system in systems_of(sources) if system.tasks()]
    kinds = _kinds(systems)
    if not kinds:
        return None
    panels = _panels(kinds, systems)
    several = any(len(system.seeds) > 1 for system in systems)
    sentences = ["Intervals are of 95%, over the items of a test set (queries, pairs, ...)."]
    if several:
        sentences = ["Scores are means over seeds, with the lowest and the highest seed; a tick in a chart is a seed."]
    if any(system.reference for system in systems):
        sentences.append("Hollow points are there to be compared with: the model before training, or BM25.")
    sentences += _marks(systems)
    tables = [_overview(panels, systems)]
    averaged = len(panels) < sum(map(len, kinds.values()))
    tables += [
        table
        for kind, tasks in kinds.items()
        if (table := _all_metrics(kind, tasks, systems, single=averaged)) is not None
    ]
    return Section("scores", "Scores", sentences, [_chart(panel, systems) for panel in panels], tables)


def _marks(systems: Sequence[System]) -> list[str]:
    """What makes scores of `systems` other ones than the usual: documents that were drawn, an approximate search."""
    found: dict[str, list[str]] = {}
    for system in systems:
        for task in system.tasks():
            for mark in dict.fromkeys(of_seed[task].marks for of_seed in system.seeds if of_seed[task].marks):
                found.setdefault(f"{task}: {mark}", []).append(system.name)
    return [f"{mark} ({listed(names)})." for mark, names in found.items()]


def _kinds(systems: Sequence[System]) -> dict[str, list[str]]:
    """Each kind of tasks, and its test sets."""
    kinds: dict[str, list[str]] = {}
    for system in systems:
        for task, kind in system.tasks().items():
            if task not in kinds.setdefault(kind, []):
                kinds[kind].append(task)
    return kinds


def _panels(kinds: dict[str, list[str]], systems: Sequence[System]) -> list[Panel]:
    """A panel for each test set, or of many sets for each kind."""
    if sum(map(len, kinds.values())) > MOST_SETS:
        return [Panel(f"{kind}, average of {len(tasks)} test sets", tasks, "score") for kind, tasks in kinds.items()]
    return [
        Panel(f"{task} ({kind})", [task], _measure(task, systems)) for kind, tasks in kinds.items() for task in tasks
    ]


def _measure(task: str, systems: Sequence[System]) -> str:
    """What a table calls the metric by which systems are compared on `task`."""
    metric = next(system.figures(task)[0].metric for system in systems if task in system.tasks())
    return headings().get(metric, metric or "main score")


def _chart(panel: Panel, systems: Sequence[System]) -> Chart:
    """A row for each system that has the scores."""
    dots, described = [], []
    for system in systems:
        by_seed = panel.of(system)
        if not by_seed:
            continue
        figures = system.figures(panel.tasks[0])
        single = figures[0] if len(panel.tasks) == 1 and len(figures) == 1 else None
        dots.append(
            Dot(
                system.name,
                fmean(by_seed),
                system.colour,
                low=single.low if single else None,
                high=single.high if single else None,
                others=by_seed if len(by_seed) > 1 else (),
                hollow=system.reference,
            )
        )
        described.append(f"{system.name} {plain(panel.cell(system))}")
    spec = dot_chart(dots, x=panel.measure, domain=_domain(dots))
    return Chart(panel.title, f"{panel.measure}: {'; '.join(described)}.", spec)


def _domain(dots: Sequence[Dot]) -> tuple[float, float]:
    """From the lowest to the highest end of `dots`, with a little room."""
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high, *dot.others) if end is not None]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _overview(panels: Sequence[Panel], systems: Sequence[System]) -> Table:
    """A row for each system: its score in each panel, and the average over all test sets where it has all."""
    everything = Panel("Average", [task for panel in panels for task in panel.tasks], "score")
    several = len(everything.tasks) > 1
    rows: list[list[Cell]] = []
    for system in systems:
        cells = [panel.cell(system) if panel.of(system) else "" for panel in panels]
        average = [spread(found) if (found := everything.of(system)) else ""] if several else []
        rows.append([system.name, *cells, *average])
    heads = [f"{panel.title}, {panel.measure}" if panel.measure != "score" else panel.title for panel in panels]
    return Table("Scores", ["System", *heads, *(["Average"] if several else [])], rows)


def _all_metrics(kind: str, tasks: Sequence[str], systems: Sequence[System], *, single: bool) -> Table | None:
    """All metrics of all systems on the test sets of a `kind`; None where there is one, unless `single` is wanted."""
    every = [
        of_seed[task].metrics for system in systems for of_seed in system.seeds for task in tasks if task in of_seed
    ]
    metrics = list(dict.fromkeys(name for metrics in every for name in metrics))
    if len(metrics) < 2 and not single:
        return None
    rows: list[list[Cell]] = []
    for task in tasks:
        for system in (system for system in systems if task in system.tasks()):
            cells = [system.cell(task, metric) for metric in metrics] or [system.cell(task)]
            rows.append([task, system.name, *cells])
    names = [headings().get(metric, metric) for metric in metrics] or ["main score"]
    return Table(f"{kind}: all metrics", ["Test set", "System", *names], rows, folded=True)


def differences_section(sources: Sequence[Source]) -> Section | None:
    """By how much systems of `sources` differ from what they are compared with; None where nothing can be compared."""
    charts, tables, sentences = [], [], []
    for source in sources:
        changes, control = source.changes, source.control
        if not changes:
            continue
        charts += _forests(source, changes, control)
        tables.append(_difference_table(changes, control))
        corrected = any(change.p_holm is not None for change in changes)
        by = "the p-value, corrected by Holm's method" if corrected else "the p-value"
        sentences.append(f"Right of 0 is above {control}. Whether a difference is shown is decided by {by}, at 5%.")
    return Section("differences", "Differences", sentences, charts, tables) if tables else None


def _over(kind: str) -> str:
    return "All test sets" if kind == ALL else kind


def _forests(source: Source, changes: Sequence[Change], control: str) -> list[Chart]:
    """A chart for each kind with a row for each arm; of a single arm one chart with a row for each kind."""
    colours = {series.name: colour_of(series.index) for series in source.series}
    if len({change.arm for change in changes}) == 1:
        names = [_over(change.kind) for change in changes]
        return [_forest(f"{changes[0].arm}: difference to {control}", names, changes, colours)]
    kinds = sorted(dict.fromkeys(change.kind for change in changes), key=lambda kind: kind != ALL)
    charts = []
    for kind in kinds[:MOST_SETS]:
        of_kind = [change for change in changes if change.kind == kind]
        names = [change.arm for change in of_kind]
        charts.append(_forest(f"{_over(kind)}: difference to {control}", names, of_kind, colours))
    return charts


def _forest(title: str, names: Sequence[str], changes: Sequence[Change], colours: dict[str, str]) -> Chart:
    """`changes` as points with their intervals, a row each under `names`."""
    dots = [
        Dot(name, change.mean, colours.get(change.arm, colour_of(0)), change.low, change.high)
        for name, change in zip(names, changes, strict=True)
    ]
    described = [f"{name} {plain(change_span(change))}" for name, change in zip(names, changes, strict=True)]
    domain = _domain([*dots, Dot("", 0.0, "")])
    return Chart(title, f"{'; '.join(described)}.", dot_chart(dots, x="difference", domain=domain, zero_rule=True))


def _difference_table(changes: Sequence[Change], control: str) -> Table:
    """Every difference with its interval, its p-values, and what could have been shown."""
    optional: dict[str, list[Cell]] = {
        "p, Holm": [p_cell(change.p_holm) for change in changes],
        "Could be shown": ["" if change.detectable is None else number(change.detectable) for change in changes],
        "Method": [change.method for change in changes],
    }
    kept = {name: cells for name, cells in optional.items() if any(cell != "" for cell in cells)}
    rows: list[list[Cell]] = []
    for i, change in enumerate(changes):
        first: list[Cell] = [
            change.arm,
            _over(change.kind),
            change_span(change),
            change.verdict,
            p_cell(change.p_value),
        ]
        rows.append([*first, *(cells[i] for cells in kept.values())])
    columns = ["System", "On", "Difference", "Verdict", "p", *kept]
    return Table(f"Differences to {control}", columns, rows, folded=len(rows) > 12)
