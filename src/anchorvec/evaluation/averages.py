"""Averages over the tasks of a benchmark, as mteb computes them, and their table."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Averages:
    """Averages of a benchmark, or of the tasks of a type, as mteb computes them."""

    scored: int
    """How many tasks the averages are of."""
    tasks: int
    """How many tasks the benchmark has; the averages are its own where all are scored."""
    means: Mapping[str, float]
    """`Mean(Task)` and `Mean(TaskType)`, and the mean of each type of task; or what else a benchmark of mteb has."""


def averages_tables(averages: Mapping[str, Averages]) -> list[Table]:
    """A table for each of `averages`, by the name of the benchmark or type; none for one without a scored task."""
    return [_table(name, found) for name, found in averages.items() if found.means]


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
