"""From what was read to a whole report: the sections in their order, and what is left out for want of numbers."""

from collections.abc import Callable, Sequence

from anchorvec.reporting.content import Report, Section, listed, number
from anchorvec.reporting.cost import cost_section
from anchorvec.reporting.differences import with_changes
from anchorvec.reporting.reading import ReportedRun, Source
from anchorvec.reporting.scores import differences_section, scores_section
from anchorvec.reporting.setup import data_section, recipe_section, repeat_section, versions_section
from anchorvec.reporting.systems import all_series, is_single
from anchorvec.reporting.training import convergence_section, exchange_section, training_section
from anchorvec.reporting.verdict import verdict_of
from anchorvec.run import STAGE_TITLES, STAGES

SECTIONS: dict[str, Callable[[Sequence[Source]], Section | None]] = {
    "scores": scores_section,
    "differences": differences_section,
    "scores against Stage II steps": convergence_section,
    "losses": training_section,
    "exchange gaps": exchange_section,
    "cost, throughput and memory": cost_section,
    "recipe": recipe_section,
    "data counts": data_section,
    "versions": versions_section,
    "commands": repeat_section,
}
"""What a reader may miss -> the function that makes its section, or None where there are no numbers."""


def assemble(sources: Sequence[Source]) -> Report:
    """The report of `sources`."""
    sources = [with_changes(source) for source in sources]
    found = {name: make(sources) for name, make in SECTIONS.items()}
    missing = [name for name, section in found.items() if section is None]
    left_out = [f"Left out, for want of numbers: {listed(missing)}."] if missing else []
    left_out += [note for source in sources for note in source.notes]
    left_out += [fault for series in all_series(sources) for run in series.runs for fault in run.faults]
    return Report(
        _title(sources),
        [line for source in sources if (line := _about(source))],
        [verdict_of(source) for source in sources],
        [section for section in found.values() if section is not None],
        left_out,
    )


def _title(sources: Sequence[Source]) -> str:
    first = sources[0]
    if first.comparison is not None:
        return f"{first.comparison.recipe}: {len(first.series)} arms"
    return first.series[0].name if is_single(sources) else listed([series.name for series in first.series][:3])


def _about(source: Source) -> str:
    """What was compared, at which budget, in a sentence."""
    if source.comparison is None:
        return _about_runs(source)
    budget, seeds = source.comparison.budget, len(source.comparison.seeds)
    amount = number(budget.amount, 0 if float(budget.amount).is_integer() else 1).text
    each = f"{amount} {budget.kind} and {seeds} seed{'s' if seeds != 1 else ''} each"
    return f"{len(source.series)} arms of the recipe {source.comparison.recipe}, {each}, against {source.control}."


def _about_runs(source: Source) -> str:
    runs = [series.runs[0] for series in source.series]
    bases = sorted({base for run in runs if (base := _base(run))})
    start = f" from {listed(bases)}" if bases else ""
    if len(runs) > 1:
        return f"{len(runs)} runs{start}, each against the first, {source.control}."
    stages = [f"{STAGE_TITLES[stage]} of {runs[0].steps[stage]:,} steps" for stage in STAGES if stage in runs[0].steps]
    made = f": {', then '.join(stages)}" if stages else ""
    return f"A text embedder made{start}{made}."


def _base(run: ReportedRun) -> str:
    model = run.recipe.get("model")
    return str(model.get("base", "")) if isinstance(model, dict) else ""
