"""Which systems a report has scores of, and what they scored on each test set: over seeds where there are several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from anchorvec.reporting.charts import colour_of
from anchorvec.reporting.content import Cell, Span, figure_cell, number
from anchorvec.reporting.reading import Figure, ReportedRun, Series, Source, SystemScores, TaskScores
from anchorvec.run import STAGES, SYSTEM_TITLES


@dataclass(frozen=True)
class System:
    """What has scores: the last model of an arm or a run, a model on the way, or BM25.

    `seeds` are its scores by test set, one for each run. `reference`: it is there to be compared with, as the untrained
    model is.
    """

    name: str
    seeds: Sequence[SystemScores]
    colour: str
    reference: bool = False

    def tasks(self) -> dict[str, str]:
        """The test sets that all seeds were scored on, and the kind of each."""
        first = self.seeds[0] if self.seeds else {}
        return {name: scores.kind for name, scores in first.items() if all(name in of_seed for of_seed in self.seeds)}

    def figures(self, task: str, metric: str = "") -> list[Figure]:
        """The score on `task` of each seed by `metric`; empty: by the one that systems are compared by."""
        found = [_figure(of_seed[task], metric) for of_seed in self.seeds if task in of_seed]
        return [figure for figure in found if figure is not None]

    def cell(self, task: str, metric: str = "") -> Cell:
        """The score on `task` by `metric` with its interval, or of several seeds the mean with their range."""
        figures = self.figures(task, metric)
        return figure_cell(figures[0]) if len(figures) == 1 else spread([figure.value for figure in figures])


def spread(values: Sequence[float]) -> Cell:
    """The mean of `values` with the lowest and the highest; of one value it alone, of none nothing."""
    if len(values) < 2:
        return number(values[0]) if values else ""
    return Span(number(fmean(values)), number(min(values)), number(max(values)), range=True)


def _figure(scores: TaskScores, metric: str) -> Figure | None:
    return scores.metrics.get(metric) if metric else scores.main


def is_single(sources: Sequence[Source]) -> bool:
    """Whether the report is of one run, whose stages are what is compared, from `sources`."""
    return len(sources) == 1 and sources[0].comparison is None and len(sources[0].series) == 1


def all_series(sources: Sequence[Source]) -> list[Series]:
    """The series of `sources`, one after another, with names that differ."""
    return [series for source in sources for series in source.series]


def systems_of(sources: Sequence[Source]) -> list[System]:
    """The systems of `sources` with scores: of one run its stages, else each series' last model; then references."""
    if is_single(sources):
        [run] = sources[0].series[0].runs
        return _stages(run)
    series = [one for one in all_series(sources) if any(run.last for run in one.finished)]
    last = [System(one.name, [run.last for run in one.finished if run.last], colour_of(one.index)) for one in series]
    return last + _references(series)


def _stages(run: ReportedRun) -> list[System]:
    """The model before training and after each stage, and BM25."""
    order = [name for name in ("bm25", "untrained", *STAGES) if name in run.scores]
    return [
        System(SYSTEM_TITLES[name], [run.scores[name]], colour_of(i), reference=name in ("bm25", "untrained"))
        for i, name in enumerate(order)
    ]


def _references(series: Sequence[Series]) -> list[System]:
    """BM25 and the untrained models of `series`; one for all where their scores are alike."""
    found: list[System] = []
    for name in ("bm25", "untrained"):
        of_series = {
            one.name: scores for one in series if (scores := [r.scores[name] for r in one.finished if name in r.scores])
        }
        alike = len({_key(scores) for of_one in of_series.values() for scores in of_one}) == 1
        if alike and len(of_series) == len(series):
            found.append(System(SYSTEM_TITLES[name], [next(iter(of_series.values()))[0]], "var(--muted)", True))
            continue
        found += [
            System(f"{one.name}, {SYSTEM_TITLES[name]}", of_series[one.name][:1], colour_of(one.index), True)
            for one in series
            if one.name in of_series
        ]
    return found


def _key(scores: SystemScores) -> tuple[tuple[str, float], ...]:
    return tuple((task, of_task.main_score) for task, of_task in scores.items())


def common_tasks(systems: Sequence[System]) -> list[str]:
    """The test sets that all of `systems` have, in the order of the first."""
    if not systems:
        return []
    others: list[Mapping[str, str]] = [system.tasks() for system in systems]
    return [task for task in others[0] if all(task in tasks for tasks in others)]
