"""What a comparison has found, as a table."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from anchorvec.reporting.differences import over_all
from anchorvec.reporting.reading import Change, ComparisonFile, TaskScores


@dataclass(frozen=True)
class CompareResult:
    """A comparison that is finished: its folder, what `comparison.json` in it holds, and the models before training.

    `untrained` are the scores by test set of each different way to read, under the names of the arms that read so.
    """

    output: str
    content: dict[str, Any]
    untrained: dict[str, dict[str, dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**self.content, "output": self.output, "untrained": self.untrained}

    @property
    def file(self) -> ComparisonFile:
        """The content, as a report reads it."""
        return ComparisonFile.model_validate(self.content)

    @property
    def differences(self) -> list[Change]:
        """Each arm's difference to the control over all test sets, or over the only one."""
        return over_all(self.file.differences)

    def __rich__(self) -> Group:
        file = self.file
        seeds = f"{len(file.seeds)} seeds" if len(file.seeds) > 1 else "one seed"
        table = Table(
            title=f"{file.recipe}: {file.budget.amount:,.10g} {file.budget.kind} an arm, {seeds}",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
        )
        table.add_column("", overflow="fold")
        for heading in ("score", f"minus {file.control}", "p (Holm)", "could be shown", ""):
            table.add_column(heading, justify="right" if heading else "left")
        changes = {change.arm: change for change in self.differences}
        for name, arm in file.arms.items():
            scored = [run.scores for run in arm.runs if not run.failed]
            table.add_row(name, _spread(scored), *_cells(changes.get(name)))
            for run in arm.runs:
                if run.failed:
                    table.add_row(Text(f"  seed {run.seed} failed: {run.failed}", style="red"))
        table.add_section()
        for name, scores in self.untrained.items():
            table.add_row(f"{name}, untrained", _spread([_task_scores(scores)]))
        table.caption = "scores: averages over test sets, of several seeds with the lowest and the highest"
        how = shlex.join(["anchorvec", "report", self.output, "--output", "report.html"])
        return Group(table, Text(how, no_wrap=True, overflow="ignore"))


def _task_scores(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScores]:
    return {task: TaskScores.model_validate(of_task) for task, of_task in scores.items()}


def _spread(runs: Sequence[Mapping[str, TaskScores]]) -> str:
    """The average score over test sets, of several runs their mean and the ends."""
    values = [fmean(of_task.main.value for of_task in scores.values()) for scores in runs if scores]
    if not values:
        return ""
    ends = f" [{min(values):.3f} to {max(values):.3f}]" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{ends}"


def _cells(change: Change | None) -> tuple[str, ...]:
    if change is None:
        return ()
    p_value = change.p_value if change.p_holm is None else change.p_holm
    shown = "" if change.detectable is None else f"{change.detectable:.3f}"
    ends = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    return ends, "<0.001" if p_value < 0.001 else f"{p_value:.3f}", shown, change.verdict
