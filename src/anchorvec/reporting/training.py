"""The sections of the training: losses with and without Stage I, exchange gaps, scores against Stage II's steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from anchorvec.reporting.charts import Line, colour_of, dash_of, line_chart
from anchorvec.reporting.content import Cell, Chart, Key, Section, Table, count, number, plain, thinned
from anchorvec.reporting.reading import ReportedRun, Series, Source
from anchorvec.reporting.systems import all_series
from anchorvec.run import STAGE_TITLES, STAGES, StageName

MOST_POINTS = 100
"""Of a curve; a table of so many rows is still one."""

DIRECTIONS = {"query_to_document": "query to document", "document_to_query": "document to query"}


@dataclass(frozen=True)
class Curve:
    """A value by step, the mean over the seeds that all have the step."""

    name: str
    index: int
    values: Mapping[int, float]
    dashed: bool = False


def training_section(sources: Sequence[Source]) -> Section | None:
    """The losses of both stages, one chart each, from `sources`; None where nothing was logged."""
    series = all_series(sources)
    charts = [chart for stage in STAGES for chart in _stage_charts(stage, series)]
    if not charts:
        return None
    sentences = ["Of several seeds the curves are means."] if any(len(one.finished) > 1 for one in series) else []
    return Section("training", "Training", sentences, charts)


def _stage_charts(stage: StageName, series: Sequence[Series]) -> list[Chart]:
    """The loss of `stage`, and what else its log has by direction."""
    losses = _curves(stage, "loss", series)
    title = STAGE_TITLES[stage]
    if stage == "stage_two":
        losses = _with_and_without_stage_one(losses, series)
        return [_chart(f"{title}: loss", losses, "loss")] if losses else []
    directions = _by_direction(stage, "", series) if len(losses) == 1 else []
    curves = directions or losses
    by = f" by direction{_whose(losses, series)}" if directions else ""
    return [_chart(f"{title}: reconstruction loss{by}", curves, "loss, nats per target")] if curves else []


def exchange_section(sources: Sequence[Source]) -> Section | None:
    """The exchange gaps of Stage I, from `sources`; None where there are none."""
    series = all_series(sources)
    sentences = [
        "By how much Stage I's loss rises when a text is written from the embedding of another pair, in nats per "
        "target. At 0 the decoder does not use the embedding."
    ]
    logged = [one for one in series if _curves("stage_one", "loss", [one])]
    if len(logged) == 1:
        curves = _by_direction("stage_one", "exchange_", logged)
        title = f"Exchange gap by direction{_whose(logged, series)}"
        charts = [_chart(title, curves, "gap, nats per target", zero=True)] if curves else []
    else:
        charts = [
            _chart(f"Exchange gap, {name}", curves, "gap, nats per target", zero=True)
            for key, name in DIRECTIONS.items()
            if (curves := _curves("stage_one", f"exchange_{key}", logged))
        ]
    return Section("exchange", "Exchange gap", sentences, charts) if charts else None


def convergence_section(sources: Sequence[Source]) -> Section | None:
    """The scores against the steps of Stage II, from `sources`; None where no model was scored on the way."""
    charts = []
    for source in sources:
        tasks = _tasks_on_the_way(source)
        curves = [_scores_on_the_way(series, tasks) for series in source.series]
        curves = [curve for curve in curves if len(curve.values) > 1]
        if not curves or not tasks:
            continue
        what = f"{tasks[0]}" if len(tasks) == 1 else f"average over {len(tasks)} test sets"
        charts.append(_chart(f"Score against Stage II steps: {what}", curves, "score", x="Stage II step"))
    sentences = ["How early Stage II's model is good."]
    return Section("convergence", "Scores on the way", sentences, charts) if charts else None


def _tasks_on_the_way(source: Source) -> list[str]:
    """The test sets that every point of every curve of `source` has."""
    points = [point for one in source.series for run in one.finished for point in run.curve]
    return [task for task in (points[0].scores if points else {}) if all(task in point.scores for point in points)]


def _scores_on_the_way(series: Series, tasks: Sequence[str]) -> Curve:
    """The average score over `tasks` by step of Stage II."""
    by_seed = [
        {point.step: fmean(point.scores[task] for task in tasks) for point in run.curve if point.stage == "stage_two"}
        for run in series.finished
        if run.curve and tasks
    ]
    return Curve(series.name, series.index, _means(by_seed))


def _curves(stage: str, key: str, series: Sequence[Series]) -> list[Curve]:
    """What the logs of `series` have under `key`, where they have it."""
    curves = [Curve(one.name, one.index, _means([_logged(run, stage, key) for run in one.runs])) for one in series]
    return [curve for curve in curves if curve.values]


def _logged(run: ReportedRun, stage: str, key: str) -> dict[int, float]:
    return {
        record["step"]: float(record[key])
        for record in run.log.get(stage, ())
        if isinstance(record.get(key), int | float)
    }


def _means(by_seed: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over seeds at each step that all of them have, without those that have nothing."""
    seeds = [values for values in by_seed if values]
    steps = [step for step in (seeds[0] if seeds else {}) if all(step in values for values in seeds)]
    return {step: fmean(values[step] for values in seeds) for step in sorted(steps)}


def _by_direction(stage: str, prefix: str, series: Sequence[Series]) -> list[Curve]:
    """Both directions of what `series`, of which one alone has any, logged under `prefix` and a direction."""
    found = [(name, _curves(stage, f"{prefix}{key}", series)) for key, name in DIRECTIONS.items()]
    return [Curve(name, i, curves[0].values) for i, (name, curves) in enumerate(found) if curves]


def _whose(drawn: Sequence[Curve | Series], series: Sequence[Series]) -> str:
    """The name of the only one that is `drawn`, where there are several `series`."""
    return f", {drawn[0].name}" if len(series) > 1 else ""


def _with_and_without_stage_one(curves: Sequence[Curve], series: Sequence[Series]) -> list[Curve]:
    """`curves` whose names say whether Stage I came before, where some have it and some, then dashed, have not."""
    has = {one.index: any(run.log.get("stage_one") for run in one.runs) for one in series}
    if len({has[curve.index] for curve in curves}) < 2:
        return list(curves)
    words = {True: "after Stage I", False: "without Stage I"}
    return [
        Curve(f"{curve.name}, {words[has[curve.index]]}", curve.index, curve.values, dashed=not has[curve.index])
        for curve in curves
    ]


def _chart(title: str, curves: Sequence[Curve], y: str, *, x: str = "step", zero: bool = False) -> Chart:
    """`curves` as lines, with a table of the same points."""
    steps = sorted({step for curve in curves for step in curve.values})
    shown = thinned(steps, MOST_POINTS)
    lines = [
        Line(
            curve.name,
            [(step, curve.values[step]) for step in shown if step in curve.values],
            colour_of(curve.index),
            (5, 3) if curve.dashed else dash_of(curve.index),
        )
        for curve in curves
    ]
    rows: list[list[Cell]] = [
        [str(step), *(number(curve.values[step]) if step in curve.values else "" for curve in curves)] for step in shown
    ]
    keys = [Key(line.name, line.colour, line.dash) for line in lines] if len(lines) > 1 else []
    note = f"{len(shown)} of {len(steps)} logged steps are shown." if len(shown) < len(steps) else ""
    described = "; ".join(_described(line) for line in lines if line.points)
    table = Table(title, [x.capitalize() if x == "step" else x, *(line.name for line in lines)], rows)
    return Chart(title, f"{described}.", line_chart(lines, x=x, y=y, zero=zero), table, keys, note)


def _described(line: Line) -> str:
    """From where to where a curve goes, in words."""
    (first, start), (last, end) = line.points[0], line.points[-1]
    way = f"{line.name}: {plain(number(start))} at step {plain(count(first))}"
    return f"{way}, {plain(number(end))} at step {plain(count(last))}" if last > first else way
