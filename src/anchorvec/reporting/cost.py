"""The section of the cost: quality against compute, throughput and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from anchorvec.reporting.charts import Dot, Line, bar_chart, colour_of, scatter_chart
from anchorvec.reporting.content import Cell, Chart, Key, Section, Table, count, number, plain
from anchorvec.reporting.reading import ReportedRun, Series, Source
from anchorvec.reporting.systems import all_series, common_tasks, is_single, systems_of
from anchorvec.run import STAGE_TITLES, STAGES, SYSTEM_TITLES


@dataclass(frozen=True)
class StageCost:
    """What a stage of a run took; None where it is not known. `held_bytes` are those of a micro-batch's activations."""

    name: str
    index: int
    stage: str
    seed: int | None
    steps: int | None
    tokens: int | None
    tokens_per_second: float | None
    seconds: float | None
    micro_batch_tokens: int | None
    held_bytes: int | None


@dataclass(frozen=True)
class Paid:
    """What a run took, and the average score that came of it."""

    series: Series
    seed: int | None
    cost: float
    score: float


_ALIKE = 0.05
"""Costs that differ by less are no axis: arms of the same budget."""


def cost_section(sources: Sequence[Source]) -> Section | None:
    """What training took, and what came of it, from `sources`; None where no run says anything of it."""
    costs = [cost for series in all_series(sources) for run in series.runs for cost in _costs(series, run)]
    charts = [
        *_quality(sources),
        *_bars(costs, "tokens_per_second", "Throughput", "tokens a second", 1.0),
        *_bars(costs, "held_bytes", "Memory of a micro-batch's activations", *_byte_unit(costs)),
    ]
    if not costs and not charts:
        return None
    sentences = ["Tokens are those that the decoder computed in training."]
    if any(cost.held_bytes for cost in costs):
        sentences.append(
            "Memory is what the activations of a micro-batch take, measured on a small one before the stage began."
        )
    return Section("cost", "Cost", sentences, charts, [_table(costs)] if costs else [])


def _byte_unit(costs: Sequence[StageCost]) -> tuple[str, float]:
    """GB, or MB where all is small; and how many bytes that is."""
    most = max((cost.held_bytes or 0 for cost in costs), default=0)
    return ("GB", 1e9) if most >= 1e8 else ("MB", 1e6)


def _costs(series: Series, run: ReportedRun) -> list[StageCost]:
    engine = run.record.get("engine", {})
    found = []
    for stage in STAGES:
        last: Mapping[str, Any] = run.log[stage][-1] if run.log.get(stage) else {}
        tokens, steps = run.tokens.get(stage), run.steps.get(stage)
        if tokens is None and steps is None:
            continue
        way = engine.get(stage) if isinstance(engine, dict) else None
        way = way if isinstance(way, dict) else {}
        micro, per_token = (_whole(way.get(key)) for key in ("micro_batch_tokens", "bytes_per_token"))
        found.append(
            StageCost(
                series.name,
                series.index,
                STAGE_TITLES[stage],
                run.seed,
                steps,
                tokens,
                _float(last.get("tokens_per_second")),
                _float(last.get("seconds")),
                micro,
                micro * per_token if micro and per_token else None,
            )
        )
    return found


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _quality(sources: Sequence[Source]) -> list[Chart]:
    """The average score against what it took, decoder tokens or minutes: where that differs from run to run."""
    if is_single(sources):
        return _quality_on_the_way(sources[0].series[0].runs[0])
    tasks = common_tasks([system for system in systems_of(sources) if not system.reference])
    finished = [(one, run) for one in all_series(sources) for run in one.finished if run.last]
    if not tasks:
        return []
    charts = []
    for what, digits in (("decoder tokens", 0), ("minutes", 1)):
        points = [
            Paid(one, run.seed, cost, fmean(run.last[task].main.value for task in tasks))
            for one, run in finished
            if (cost := sum(run.tokens.values()) if what == "decoder tokens" else run.minutes)
        ]
        costs = [point.cost for point in points]
        if len(points) > 1 and max(costs) > (1 + _ALIKE) * min(costs):
            charts.append(_quality_chart(points, what, digits, tasks))
    return charts


def _quality_chart(points: Sequence[Paid], what: str, digits: int, tasks: Sequence[str]) -> Chart:
    series = {point.series.index: point.series for point in points}
    lines = [
        Line(one.name, [(point.cost, point.score) for point in points if point.series is one], colour_of(one.index))
        for one in series.values()
    ]
    rows: list[list[Cell]] = []
    for point in points:
        seed = "" if point.seed is None else str(point.seed)
        rows.append([point.series.name, seed, number(point.cost, digits), number(point.score)])
    title = f"Score against {what}: {_averaged(tasks)}"
    return Chart(
        title,
        "; ".join(f"{row[0]}: {plain(row[3])} for {plain(row[2])} {what}" for row in rows) + ".",
        scatter_chart(lines, x=what, y="score"),
        Table(title, ["System", "Seed", what.capitalize(), "Score"], rows),
        [Key(line.name, line.colour, point=True) for line in lines],
    )


def _averaged(tasks: Sequence[str]) -> str:
    return tasks[0] if len(tasks) == 1 else f"average over {len(tasks)} test sets"


def _quality_on_the_way(run: ReportedRun) -> list[Chart]:
    """Of a single run: the average score after each stage against the tokens until then."""
    names = [name for name in ("untrained", *STAGES) if name in run.scores]
    tasks = [task for task in run.scores[names[0]] if all(task in run.scores[name] for name in names)] if names else []
    if len(names) < 2 or not tasks or not run.tokens:
        return []
    points, tokens = [], 0.0
    for name in names:
        tokens += run.tokens.get(name, 0)
        points.append((tokens, fmean(run.scores[name][task].main.value for task in tasks)))
    titles = [SYSTEM_TITLES[name] for name in names]
    lines = [Line(name, [point], colour_of(i)) for i, (name, point) in enumerate(zip(titles, points, strict=True))]
    title = f"Score against decoder tokens: {_averaged(tasks)}"
    rows: list[list[Cell]] = [[line.name, count(line.points[0][0]), number(line.points[0][1])] for line in lines]
    way = Line("on the way", points, "var(--muted)", (4, 3))
    return [
        Chart(
            title,
            "; ".join(f"{row[0]}: {plain(row[2])} at {plain(row[1])} tokens" for row in rows) + ".",
            scatter_chart([way, *lines], x="decoder tokens", y="score"),
            Table(title, ["System", "Decoder tokens", "Score"], rows),
            [Key(line.name, line.colour, point=True) for line in lines],
        )
    ]


def _bars(costs: Sequence[StageCost], field: str, title: str, unit: str, divisor: float) -> list[Chart]:
    """A bar for each series and stage, the mean over its seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    colours = {}
    for cost in costs:
        value = getattr(cost, field)
        if value is not None:
            found.setdefault((cost.name, cost.stage), []).append(value / divisor)
            colours[cost.name] = colour_of(cost.index)
    if not found:
        return []
    one = len(colours) == 1
    dots = [
        Dot(stage if one else f"{name}, {stage}", fmean(values), colours[name])
        for (name, stage), values in found.items()
    ]
    digits = 0 if divisor == 1.0 else 2
    described = "; ".join(f"{dot.name} {plain(number(dot.value, digits))} {unit}" for dot in dots)
    return [Chart(title, f"{described}.", bar_chart(dots, x=unit))]


def _table(costs: Sequence[StageCost]) -> Table:
    """All that is known of each stage of each run."""
    several = len({(cost.name, cost.seed) for cost in costs}) > 1
    unit, size = _byte_unit(costs)
    columns = ["Stage", "Steps", "Tokens", "Tokens a second", "Minutes", "Micro-batch tokens", f"Its memory, {unit}"]
    rows: list[list[Cell]] = []
    for cost in costs:
        cells: list[Cell] = [
            _cell(cost.steps, 0),
            _cell(cost.tokens, 0),
            _cell(cost.tokens_per_second, 0),
            _cell(None if cost.seconds is None else cost.seconds / 60, 2),
            _cell(cost.micro_batch_tokens, 0),
            _cell(None if cost.held_bytes is None else cost.held_bytes / size, 2),
        ]
        names: list[Cell] = [cost.name, "" if cost.seed is None else str(cost.seed)] if several else []
        rows.append([*names, cost.stage, *cells])
    return Table(
        "What each stage took", [*(["System", "Seed"] if several else []), *columns], rows, folded=len(rows) > 12
    )


def _cell(value: float | None, digits: int) -> Cell:
    return "" if value is None else number(value, digits)
