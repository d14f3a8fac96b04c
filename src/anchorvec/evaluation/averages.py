"""What `evaluate` gives back: the scores by task, and the averages of each benchmark that was asked for by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from anchorvec.evaluation.scores import Scores

PAPER_15 = "paper-15"
"""The name of the 15 tasks of MTEB(eng, v1) that LLM2Vec, and the paper after it, try their choices on."""


@dataclass(frozen=True)
class Averages:
    """Averages of a benchmark, or of the tasks of a type, as mteb computes them."""

    scored: int
    """How many tasks the averages are of."""
    tasks: int
    """How many tasks the benchmark has; the averages are its own where all are scored."""
    means: Mapping[str, float]
    """`Mean(Task)` and `Mean(TaskType)`, and the mean of each type of task; or what else a benchmark of mteb has."""


class Evaluation(dict[str, Scores]):
    """The scores of a model, by test set and task."""

    def __init__(
        self, scores: Mapping[str, Scores] | None = None, averages: Mapping[str, Averages] | None = None
    ) -> None:
        """`scores` by test set and task, `averages` by benchmark."""
        super().__init__(scores or {})
        self.averages = dict(averages or {})

    def averages_tables(self) -> list[Table]:
        """A table for each benchmark that was asked for by name, with its averages."""
        return [_table(name, found) for name, found in self.averages.items() if found.means]


def _table(name: str, found: Averages) -> Table:
    whole = found.scored == found.tasks
    title = f"{name}: {found.tasks} tasks" if whole else f"{name}: {found.scored} of {found.tasks} tasks"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for what, mean in found.means.items():
        table.add_row(what, f"{mean:.4f}")
    if not whole:
        table.caption = "of the tasks that were scored, not the benchmark's own"
    return table
