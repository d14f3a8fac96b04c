"""By how much systems differ: as a comparison's file says, or computed item by item for single runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import Difference, Scores, statistics
from anchorvec.evaluation.figures import Pair
from anchorvec.evaluation.scores import paired
from anchorvec.reporting.reading import Change, ReportedRun, Source, SystemScores
from anchorvec.run import STAGES, SYSTEM_TITLES

ALL = "all"
"""What a comparison's file calls the average over all test sets."""

MOST_SETS = 8
"""With more test sets it is kinds of tasks that are shown, each with the average over its sets."""


def with_changes(source: Source) -> Source:
    """`source` with its differences: of runs to the first one, of a single run's last model to the untrained one.

    The p-values are corrected by Holm's method: those over all test sets for the number of runs, the others for the
    number of them all. What could not be compared is among the notes. Those of a comparison are as they were read.
    """
    if source.comparison is not None:
        return source
    first = source.series[0].runs[0]
    if len(source.series) == 1:
        control, systems = _stages(first)
    else:
        control, systems = first.last, {series.name: series.runs[0].last for series in source.series[1:]}
    found: list[tuple[str, str, Difference]] = []
    notes = list(source.notes)
    for name, scores in systems.items():
        pairs, faults = _pairs(control, scores)
        notes += [f"{name}, {fault}" for fault in faults]
        found += [(name, kind, statistics.difference(sets)) for kind, sets in _averaged(pairs).items()]
    changes = corrected(found)
    name = f"the {SYSTEM_TITLES['untrained']} model" if len(source.series) == 1 else source.control
    return replace(source, control=name, changes=changes, notes=notes)


def groups(kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """Under which name which test sets are averaged, of `kinds`, set -> kind: all, and each set, or of many each kind.

    A single set has its own name alone.
    """
    if len(kinds) < 2:
        return {task: [task] for task in kinds}
    found: dict[str, list[str]] = {ALL: list(kinds)}
    for task, kind in kinds.items():
        found.setdefault(task if len(kinds) <= MOST_SETS else kind, []).append(task)
    return found


def _stages(run: ReportedRun) -> tuple[SystemScores, dict[str, SystemScores]]:
    """The scores of the untrained model of `run`, and those of its last model under its title."""
    last = next((stage for stage in reversed(STAGES) if stage in run.scores), None)
    if last is None:
        return {}, {}
    title = SYSTEM_TITLES[last]
    return run.scores.get("untrained", {}), {f"{title[0].upper()}{title[1:]}": run.scores[last]}


def _pairs(control: SystemScores, system: SystemScores) -> tuple[dict[tuple[str, str], Pair], list[str]]:
    """What both were scored on, by test set and kind, item by item; and what could not be paired, with the reason."""
    pairs, faults = {}, []
    for task, scores in system.items():
        if task not in control:
            continue
        try:
            first, second = (Scores.from_dict(read.model_dump()) for read in (control[task], scores))
            pairs[task, scores.kind] = paired(first, second)
        except AnchorvecError as error:
            faults.append(f"{task}: {error}")
        except (KeyError, TypeError, AttributeError):
            faults.append(f"{task}: not compared, since its scores are incomplete")
    return pairs, faults


def _averaged(pairs: dict[tuple[str, str], Pair]) -> dict[str, list[Pair]]:
    """Under which name which test sets are averaged: all, and each set, or of many sets each kind."""
    by_task = {task: pair for (task, _), pair in pairs.items()}
    return {name: [by_task[task] for task in tasks] for name, tasks in groups(dict(pairs.keys())).items()}


def corrected(rows: Sequence[tuple[str, str, Difference]]) -> list[Change]:
    """`rows` of system, kind and difference; p-values are corrected by Holm's method where there are several.

    Those over all test sets for the number of systems, the others for the number of them all.
    """
    changes = []
    for group in ([row for row in rows if row[1] == ALL], [row for row in rows if row[1] != ALL]):
        found = [row[2] for row in group]
        found = statistics.holm(found) if len(found) > 1 else found
        changes += [_change(name, kind, one) for (name, kind, _), one in zip(group, found, strict=True)]
    return changes


def _change(name: str, kind: str, found: Difference) -> Change:
    detectable = found.detectable()
    return Change(
        arm=name,
        kind=kind,
        mean=found.mean,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        p_holm=found.p_holm,
        method=found.method,
        verdict=found.verdict,
        detectable=detectable if math.isfinite(detectable) else None,
    )


def over_all(changes: Sequence[Change]) -> list[Change]:
    """Of `changes` those over all test sets; where no such were made, those of the only test set or kind there is."""
    found = [change for change in changes if change.kind == ALL]
    return found or (list(changes) if len({change.kind for change in changes}) == 1 else [])
