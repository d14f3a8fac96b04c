"""A model's scores with those of baselines beside them: averages by kind, differences, and their tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from anchorvec.evaluation import statistics
from anchorvec.evaluation.scores import Scores, paired, scores_table
from anchorvec.evaluation.statistics import PERCENTILE, Difference, Interval
from anchorvec.evaluation.tasks import headings, kind_of_mteb_type


@dataclass(frozen=True)
class Compared:
    """By how much a model is above a baseline on a test set, or on average over several of one kind."""

    kind: str
    metric: str
    sets: tuple[str, ...]
    baseline: str
    model_score: Interval
    baseline_score: Interval
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, among them the words of the verdict."""
        found = self.difference
        return {
            "kind": self.kind,
            "metric": self.metric,
            "sets": list(self.sets),
            "baseline": self.baseline,
            "model_score": _plain(self.model_score),
            "baseline_score": _plain(self.baseline_score),
            "difference": _plain(found),
            "p_value": found.p_value,
            "p_holm": found.p_holm,
            "comparisons": found.comparisons,
            "verdict": found.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """A model's scores beside those of baselines, and by how much they differ; prints as a table for each kind.

    `scores` are the model's, by task, `model` is what it is called. `baselines` are, by name, each one's scores by the
    same tasks, as far as it has some. `seed` is that of intervals and p-values.
    """

    scores: Mapping[str, Scores]
    baselines: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    model: str = ""
    seed: int = 0

    @cached_property
    def averages(self) -> dict[str, Interval]:
        """Of each kind with several tasks that are scored item by item the average of its first metric."""
        of_kinds = {kind: self._scored(self.scores, kind) for kind in self._kinds()}
        return {
            kind: self._average([self.scores[task] for task in tasks]) for kind, tasks in of_kinds.items() if tasks[1:]
        }

    @cached_property
    def compared(self) -> list[Compared]:
        """Each difference from a baseline: by kind, baseline and task, then their average; p-values after Holm."""
        rows = []
        for kind in self._kinds():
            for baseline, of_baseline in self.baselines.items():
                tasks = [task for task in self._scored(self.scores, kind) if task in self._scored(of_baseline, kind)]
                several = [tuple(tasks)] if len(tasks) > 1 else []
                rows += [self._compare(kind, baseline, sets) for sets in [*((task,) for task in tasks), *several]]
        corrected = statistics.holm([row.difference for row in rows])
        return [replace(row, difference=found) for row, found in zip(rows, corrected, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a file of them can be a baseline of a later evaluation."""
        return {
            "model": self.model,
            "scores": {task: scores.to_dict() for task, scores in self.scores.items()},
            "averages": {kind: _plain(average) for kind, average in self.averages.items()},
            "baselines": {
                name: {task: scores.to_dict() for task, scores in of_baseline.items()}
                for name, of_baseline in self.baselines.items()
            },
            "compared": [row.to_dict() for row in self.compared],
        }

    def __rich__(self) -> Group:
        table_of = self._table if self.baselines else self._table_alone
        return Group(*(table_of(kind, f"{self.model}: {kind}" if self.model else kind) for kind in self._kinds()))

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(scores.kind for scores in self.scores.values()))

    def _scored(self, of_system: Mapping[str, Scores], kind: str) -> list[str]:
        """The tasks of a kind with scores of single items."""
        return [task for task, scores in of_system.items() if scores.kind == kind and scores.metrics]

    def _average(self, scores: Sequence[Scores]) -> Interval:
        kind = kind_of_mteb_type(scores[0].kind)
        assert kind is not None  # it has read the single items
        metric = next(iter(scores[0].metrics))
        return statistics.interval([kind.samples(of.per_item)[metric] for of in scores], seed=self.seed)

    def _compare(self, kind: str, baseline: str, sets: tuple[str, ...]) -> Compared:
        own, other = ([of_system[task] for task in sets] for of_system in (self.scores, self.baselines[baseline]))
        pairs = [paired(second, first) for first, second in zip(own, other, strict=True)]
        metric = next(iter(own[0].metrics))
        one, two = (of[0].metrics[metric] if len(of) == 1 else self._average(of) for of in (own, other))
        return Compared(kind, metric, sets, baseline, one, two, statistics.difference(pairs, seed=self.seed))

    def _table_alone(self, kind: str, title: str) -> Table:
        """Every metric of the model's tasks of a kind, and the average below."""
        of_kind = {task: scores for task, scores in self.scores.items() if scores.kind == kind}
        table = scores_table(of_kind, title=title)
        if kind in self.averages:
            first = headings()[next(iter(of_kind[self._scored(self.scores, kind)[0]].metrics))]
            table.caption = f"average {first}: {self.averages[kind]}, items drawn within each set"
        elif len(of_kind) > 1:
            average = sum(scores.main_score for scores in of_kind.values()) / len(of_kind)
            table.caption = f"average of {len(of_kind)} main scores: {average:.3f}"
        return table

    def _table(self, kind: str, title: str) -> Table:
        """Of each task of a kind, and of their average, the model's score and below it those of the baselines."""
        tasks = [task for task, scores in self.scores.items() if scores.kind == kind]
        rows = [row for row in self.compared if row.kind == kind]
        metric = next((headings()[row.metric] for row in rows), "main score")
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        table.add_column("", overflow="fold")
        for heading in (metric, "model minus it", "p (Holm)", "interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for task in tasks:
            table.add_row(escape(task + self.scores[task].marks), _score(self.scores[task]))
            for name, of_baseline in self.baselines.items():
                found = next((row for row in rows if row.baseline == name and row.sets == (task,)), None)
                if task in of_baseline:
                    table.add_row(f"  {escape(self._short(name))}", _score(of_baseline[task]), *_difference(found))
            table.add_section()
        averages = [row for row in rows if len(row.sets) > 1]
        for sets in dict.fromkeys(row.sets for row in averages):
            of_sets = [row for row in averages if row.sets == sets]
            table.add_row(f"average of {len(sets)}", str(of_sets[0].model_score))
            for row in of_sets:
                table.add_row(f"  {escape(self._short(row.baseline))}", str(row.baseline_score), *_difference(row))
        table.caption = self._caption(kind, rows) if rows else None
        return table

    def _short(self, baseline: str) -> str:
        """A baseline's name, of a long path its last two parts where they tell it from the others."""
        ends = {name: "/".join(name.rsplit("/", 2)[-2:]) for name in self.baselines}
        return ends[baseline] if list(ends.values()).count(ends[baseline]) == 1 else baseline

    def _caption(self, kind: str, rows: Sequence[Compared]) -> str:
        """How a table's intervals and p-values were found."""
        of_kind = kind_of_mteb_type(kind)
        assert of_kind is not None  # it has compared the rows
        lines = [of_kind.method]
        if any(len(row.sets) > 1 for row in rows):
            lines.append("of an average both within each set")
        if any(row.difference.method == PERCENTILE for row in rows):
            lines.append(f"{PERCENTILE}: all differences are the same, and have no BCa")
        lines.append(f"p is corrected for all {rows[0].difference.comparisons} differences (Holm)")
        return "; ".join(lines)


def _difference(row: Compared | None) -> tuple[str, ...]:
    if row is None:
        return ()
    found = row.difference
    p_value = found.p_value if found.p_holm is None else found.p_holm
    ends = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return ends, "<0.001" if p_value < 0.001 else f"{p_value:.3f}", found.method


def _score(scores: Scores) -> str:
    return str(next(iter(scores.metrics.values()), f"{scores.main_score:.3f}"))


def _plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "interval": [interval.low, interval.high], "method": interval.method}
