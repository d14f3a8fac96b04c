"""The sections of what was run: the recipe and its differences, the data, versions, commands to repeat."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from anchorvec.recipe import Recipe
from anchorvec.recipe.yaml12 import dump, show
from anchorvec.reporting.content import Cell, Code, Number, Section, Table, count, number
from anchorvec.reporting.reading import ReportedRun, Source
from anchorvec.reporting.systems import all_series, is_single

_OWN = ("output", "data.train")
"""Keys that are no difference between recipes: a path of the machine, and the data, which have a section."""


def recipe_section(sources: Sequence[Source]) -> Section | None:
    """What the recipes differ in, from `sources`; None where no recipe is known."""
    tables = [table for source in sources for table in _recipe_tables(source, is_single(sources))]
    first = next((run for run in _runs(sources) if run.recipe), None)
    code = []
    if first is not None:
        shown = {key: value for key, value in first.recipe.items() if key != "output"}
        code = [Code(f"The recipe of {first.name}, with its defaults", dump(shown).strip(), "yaml", folded=True)]
    return Section("recipe", "Recipe", [], [], tables, code) if tables or code else None


def _recipe_tables(source: Source, single: bool) -> list[Table]:
    if source.comparison is not None:
        return _tables_of_arms(source)
    first = source.series[0].runs[0]
    if single:
        return _against_defaults(first)
    rows: list[list[Cell]] = [
        [series.name, key, _shown(value), _shown(before)]
        for series in source.series[1:]
        for key, value, before in _differing(series.runs[0].recipe, first.recipe)
        if series.runs[0].recipe and first.recipe
    ]
    title = f"What differs from the recipe of {source.control}"
    return [Table(title, ["Run", "Key", "Value", source.control], rows)] if rows else []


def _tables_of_arms(source: Source) -> list[Table]:
    """What each arm changes in the recipe, with the learning rate that its tries chose; and these tries."""
    assert source.comparison is not None
    arms: list[list[Cell]] = []
    tries: list[list[Cell]] = []
    for series in source.series:
        changed = "; ".join(f"{key}: {show(value)}" for key, value in series.arm.differences.items())
        rates = "; ".join(f"{stage}: {rate:g}" for stage, rate in series.arm.learning_rate.items())
        arms.append([series.name, changed or "nothing", rates])
        for one in series.arm.tries:
            score = "" if one.score is None else number(one.score)
            tries.append([series.name, Number(one.learning_rate, f"{one.learning_rate:g}"), score, _whole(one.tokens)])
    title = f"What each arm changes in the recipe {source.comparison.recipe}"
    tables = [Table(title, ["Arm", "Changes", "Learning rate"], arms)]
    columns = ["Arm", "Learning rate", "Score", "Tokens"]
    return [*tables, Table("Learning rates that were tried", columns, tries, folded=True)] if tries else tables


def _against_defaults(run: ReportedRun) -> list[Table]:
    """What the recipe of `run` has other than a recipe's defaults."""
    if not run.recipe:
        return []
    defaults = Recipe.model_validate({"data": {"train": [{"path": "-"}]}}).model_dump(mode="json")
    rows: list[list[Cell]] = [
        [key, _shown(value), _shown(before)] for key, value, before in _differing(run.recipe, defaults)
    ]
    return [Table("What differs from a recipe's defaults", ["Key", "This run", "Default"], rows)] if rows else []


def _differing(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each key whose value is not that of the `other` recipe, with both; a section that is off is one row."""
    found = []
    mine, others = flattened(recipe), flattened(other)
    for key in dict.fromkeys([*mine, *others]):
        inside = [section for section in (key.rpartition(".")[0], key.partition(".")[0]) if section not in ("", key)]
        off = any(section in (mine if key not in mine else others) for section in inside)
        if key.startswith(_OWN) or off or mine.get(key, _ON) == others.get(key, _ON):
            continue
        found.append((key, mine.get(key, _ON), others.get(key, _ON)))
    return found


_ON = object()
"""Of a section that is written out where the other recipe has it switched off."""


def _shown(value: Any) -> str:
    return "on" if value is _ON else show(value)


def flattened(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The `values` of a recipe by dotted key, each behind its `place`; lists of sections count with their numbers."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{place}.{key}" if place else str(key)
        sections = (
            dict(enumerate(value)) if isinstance(value, list) and any(isinstance(v, dict) for v in value) else value
        )
        if isinstance(sections, dict) and sections:
            flat |= flattened(sections, name)
        else:
            flat[name] = value
    return flat


def data_section(sources: Sequence[Source]) -> Section | None:
    """How many pairs were read of each data set, and left out, from `sources`; None where no run says it."""
    by_content: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for run in _runs(sources):
        data = run.record.get("data")
        if isinstance(data, dict) and data:
            by_content.setdefault(repr(data), ([], data))[0].append(run.name)
    tables = []
    for names, data in by_content.values():
        caption = "Training pairs" if len(by_content) == 1 else f"Training pairs of {', '.join(names)}"
        tables.append(_data_table(caption, data))
    sentences = [line for source in sources for line in _same_rows(source)]
    return Section("data", "Data", sentences, [], tables) if tables or sentences else None


def _data_table(caption: str, data: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for name, report in data.items():
        of = report if isinstance(report, dict) else {}
        rejected, mended = (sum(_counts(of.get(key))) for key in ("rejected", "mended"))
        counts = [of.get("read"), of.get("rows"), rejected, mended, of.get("dropped_negatives")]
        rows.append([name, str(of.get("path", "")), *(_whole(value) for value in counts)])
    columns = ["Data set", "Path", "Rows read", "Pairs kept", "Left out", "Mended", "Negatives left out"]
    return Table(caption, columns, rows)


def _counts(value: object) -> list[int]:
    return [n for n in value.values() if isinstance(n, int)] if isinstance(value, dict) else []


def _whole(value: object) -> Cell:
    return count(value) if isinstance(value, int) else ""


def _same_rows(source: Source) -> list[str]:
    """Whether the arms of a comparison saw the same rows in the same order, by their hashes."""
    if source.comparison is None:
        return []
    hashes: dict[int | None, set[str]] = {}
    for series in source.series:
        for run in series.finished:
            hashes.setdefault(run.seed, set()).add(run.rows_hash)
    if not hashes or any("" in of_seed for of_seed in hashes.values()):
        return []
    others = [str(seed) for seed, of_seed in hashes.items() if len(of_seed) > 1]
    if others:
        return [f"The arms did not see the same rows in the same order, with seed {', '.join(others)}."]
    return ["With each seed all arms saw the same rows in the same order, by a hash of them."]


def versions_section(sources: Sequence[Source]) -> Section | None:
    """Versions, machine and number format of the runs, each value once, from `sources`; None where no run says them."""
    runs = [run for run in _runs(sources) if run.record]
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        known = {name: run.record[name] for name in ("device", "threads", "precision") if name in run.record}
        for name, value in {**known, **_versions(run)}.items():
            found.setdefault(name, {}).setdefault(str(value), []).append(run.name)
    rows: list[list[Cell]] = []
    for name, of_value in found.items():
        for value, names in of_value.items():
            of_runs = "all" if len(names) == len(runs) else ", ".join(names)
            rows.append([name, value, of_runs] if len(runs) > 1 else [name, value])
    columns = ["What", "Value", *(["Runs"] if len(runs) > 1 else [])]
    table = Table("What it ran with", columns, rows)
    return Section("versions", "Versions and machine", [], [], [table]) if rows else None


def _versions(run: ReportedRun) -> Mapping[str, Any]:
    found = run.record.get("versions")
    return found if isinstance(found, dict) else {}


def repeat_section(sources: Sequence[Source]) -> Section | None:
    """The commands that make the same again, from `sources`; None where none is known."""
    comparisons = [source.comparison for source in sources if source.comparison is not None]
    lines = [_joined(comparison.command) for comparison in comparisons if comparison.command]
    lines += [_train(run) for run in _runs(sources) if run.recipe]
    if not lines:
        return None
    code = [Code("Commands", "\n".join(lines), "bash", folded=len(lines) > 12)]
    versions = next((found for run in _runs(sources) if (found := _versions(run))), {})
    own = ("python", "anchorvec")
    pins = [f"{name}=={str(value).partition('+')[0]}" for name, value in versions.items() if name not in own]
    if pins:
        code.insert(0, Code("Versions", f"pip install {_joined(pins)}", "bash"))
    sentence = "Paths are those of the runs' folders; the recipe there has every value that was used."
    return Section("repeat", "To repeat it", [sentence], [], [], code)


def _train(run: ReportedRun) -> str:
    """The command that makes as many steps again, on the same pairs."""
    return _joined(["anchorvec", "train", f"{run.name}/recipe.yaml", f"output={run.name}-again"])


def _joined(words: Sequence[str]) -> str:
    return shlex.join(" ".join(word.split()) for word in words)


def _runs(sources: Sequence[Source]) -> list[ReportedRun]:
    return [run for series in all_series(sources) for run in series.runs]
