"""What was found, in sentences: each with its interval, and `no difference shown` where that is so."""

from collections.abc import Sequence

from anchorvec.evaluation.statistics import NO_DIFFERENCE
from anchorvec.reporting.content import Cell, Number, Span, Verdict, count, number, signed
from anchorvec.reporting.differences import ALL, over_all
from anchorvec.reporting.reading import Change, Source

Sentence = list[Cell]

_RANKS = {"higher": 0, NO_DIFFERENCE: 1, "lower": 2}


def verdict_of(source: Source) -> Verdict:
    """The verdict of `source`: the highest first, then the others, what could have been shown, what failed."""
    overall, control = over_all(source.changes) or source.changes, source.control
    if not overall:
        return Verdict(_without_scores(source), _failed(source))
    ordered = sorted(overall, key=_order)
    others = [_group(verdict, ordered[1:], control) for verdict in _RANKS]
    sentences = [*others, _detectable(overall), *_failed(source)]
    return Verdict(_headline(ordered[0], control, source), [sentence for sentence in sentences if sentence])


def _order(change: Change) -> tuple[int, float]:
    """The best first: those that are higher, then those of which nothing is shown, each by their size."""
    return _RANKS.get(change.verdict, 1), -change.mean


def change_span(change: Change) -> Span:
    """The difference of `change` with its interval, with signs."""
    return Span(signed(change.mean), signed(change.low), signed(change.high))


def p_cell(p_value: float | None) -> Cell:
    """A `p_value` as tables have it; empty where there is none."""
    if p_value is None:
        return ""
    return Number(p_value, "< 0.001" if p_value < 0.001 else f"{p_value:.3f}")


def _headline(change: Change, control: str, source: Source) -> Sentence:
    """One difference in words, with its interval, what it is taken over, and how likely it is by chance."""
    if change.verdict == NO_DIFFERENCE:
        start = f"{change.arm}: {NO_DIFFERENCE} against {control}, "
    else:
        start = f"{change.arm} scores {change.verdict} than {control}: "
    seeds = len(source.comparison.seeds) if source.comparison is not None else 1
    of_seeds = f"{seeds} seeds" if seeds > 1 else "one seed"
    corrected = ", corrected for the number of comparisons" if change.p_holm is not None else ""
    return [start, change_span(change), f" {_over(change)} ({of_seeds}; p ", _p(change), f"{corrected})."]


def _group(verdict: str, changes: Sequence[Change], control: str) -> Sentence:
    """All of `changes` with the same `verdict`, in one sentence."""
    group = [change for change in changes if change.verdict == verdict]
    if not group:
        return []
    kinds = {change.kind for change in changes}
    words = f"{verdict} than {control}" if verdict != NO_DIFFERENCE else f"{NO_DIFFERENCE} against {control}"
    sentence: Sentence = [f"{words[0].upper()}{words[1:]}: "]
    for i, change in enumerate(group):
        where = f" on {change.kind}" if len(kinds) > 1 else ""
        sentence += [", " if i else "", f"{change.arm} ", change_span(change), where]
    return [*sentence, "."]


def _detectable(changes: Sequence[Change]) -> Sentence:
    """The smallest differences that could have been shown, where they are known."""
    able = sorted({change.detectable for change in changes if change.detectable is not None})
    if not able:
        return []
    start = "The smallest difference that this budget could have shown: "
    several: Sentence = [" to ", number(able[-1]), ", by arm"] if number(able[-1]).text != number(able[0]).text else []
    return [start, number(able[0]), *several, "."]


def _over(change: Change) -> str:
    return "on average over all test sets" if change.kind == ALL else f"on {change.kind}"


def _p(change: Change) -> Number:
    p_value = change.p_value if change.p_holm is None else change.p_holm
    return Number(p_value, "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}")


def _failed(source: Source) -> list[Sentence]:
    """A sentence for each run that failed, with its reason."""
    failed = [(series.name, run) for series in source.series for run in series.runs if run.failed]
    return [[f"{name}, seed {run.seed}, failed: {run.failed}."] for name, run in failed]


def _without_scores(source: Source) -> Sentence:
    """What can be said where nothing can be compared: the losses of the last stage of the first run."""
    run = source.series[0].runs[0]
    records = list(run.log.values())[-1] if run.log else []
    losses = [record["loss"] for record in records if isinstance(record.get("loss"), int | float)]
    nothing = "No two systems have scores on the same data, so nothing is said of which is better"
    if not losses:
        return [f"{nothing}."]
    steps = count(records[-1]["step"])
    return [f"{nothing}. The loss went from ", number(losses[0]), " to ", number(losses[-1]), " in ", steps, " steps."]
