"""What a report is made of: the files of runs and comparisons, as they are on disk, in one form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from anchorvec.errors import AnchorvecError
from anchorvec.files import read_json_lines, user_path
from anchorvec.recipe.yaml12 import parse
from anchorvec.run import STAGES, Run

COMPARISON = "comparison.json"
T = TypeVar("T")


class _Form(BaseModel):
    """What is read of a file; keys that are not named here are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


@dataclass(frozen=True)
class Figure:
    """A score with the ends of its interval, where it has one, and the metric that it is of; empty: mteb's own."""

    value: float
    low: float | None = None
    high: float | None = None
    metric: str = ""


class TaskScores(_Form, extra="allow"):
    """The scores of one system on one test set, as `Scores.to_dict` writes them."""

    kind: str
    main_score: float
    sampled: int | None = None
    recall: float | None = None

    @model_validator(mode="after")
    def _metrics_are_numbers(self) -> Self:
        flat = self.model_extra or {}
        for key in flat:
            name = key.removesuffix("_interval")
            if key != name and name in flat and not _is_interval(flat[name], flat[key]):
                raise ValueError(f"{name} and {key} must be a number and two")
        return self

    @property
    def marks(self) -> str:
        """What makes these other scores than the usual ones; empty if nothing does."""
        marks = (
            [f"{self.sampled:,} other documents, drawn, beside the relevant ones"] if self.sampled is not None else []
        )
        marks += [f"an approximate search, recall {self.recall:.3f}"] if self.recall is not None else []
        return ", ".join(marks)

    @property
    def metrics(self) -> dict[str, Figure]:
        """Each metric that has an interval, in the order of the file."""
        flat = self.model_extra or {}
        names = [key.removesuffix("_interval") for key in flat if key.endswith("_interval")]
        ends = {name: flat[f"{name}_interval"] for name in names if name in flat}
        return {name: Figure(flat[name], low, high, name) for name, (low, high) in ends.items()}

    @property
    def main(self) -> Figure:
        """The metric by which systems are compared, or the main score where no metric has an interval."""
        return next(iter(self.metrics.values()), Figure(self.main_score))


def _is_interval(value: object, ends: object) -> bool:
    numbers = [value, *ends] if isinstance(ends, list) else []
    return len(numbers) == 3 and all(isinstance(one, int | float) for one in numbers)


SystemScores = Mapping[str, TaskScores]
"""Test set -> its scores."""


class CurvePoint(_Form):
    """The scores, by test set, after so many steps of a stage."""

    stage: str
    step: int
    scores: dict[str, float]


class _Record(_Form):
    """`run.json`, where a form is asked of it."""

    curve: list[CurvePoint] = []


class Change(_Form):
    """By how much an arm is above the control, over the test sets of a kind or over `all`."""

    arm: str
    kind: str
    mean: float
    low: float
    high: float
    p_value: float
    p_holm: float | None = None
    method: str = ""
    verdict: str
    detectable: float | None = None


class Trial(_Form):
    """A learning rate that was tried: its score, and the tokens of the try."""

    learning_rate: float
    score: float | None = None
    tokens: int | None = None


class ArmRun(_Form):
    """One run of an arm, as the comparison's file has it."""

    seed: int
    folder: str = ""
    failed: str = ""
    tokens: dict[str, int] = {}
    steps: dict[str, int] = {}
    minutes: float | None = None
    rows_hash: str = ""
    scores: dict[str, TaskScores] = {}
    curve: list[CurvePoint] = []


class Arm(_Form):
    """An arm, as the comparison's file has it."""

    differences: dict[str, Any] = {}
    learning_rate: dict[str, float] = {}
    tries: list[Trial] = []
    runs: list[ArmRun] = []


class Budget(_Form):
    """What all arms had alike."""

    kind: str
    amount: float


class ComparisonFile(_Form):
    """`comparison.json`."""

    recipe: str
    budget: Budget
    seeds: list[int]
    control: str
    arms: dict[str, Arm] = Field(min_length=1)
    differences: list[Change] = []
    command: list[str] = []

    @model_validator(mode="after")
    def _control_is_an_arm(self) -> Self:
        if self.control not in self.arms:
            raise ValueError(f"the control {self.control!r} is none of the arms ({', '.join(self.arms)})")
        return self


@dataclass(frozen=True)
class ReportedRun:
    """A run: what its folder says, and of a run of a comparison what the comparison's file says.

    `scores` are by system (`untrained`, `stage_one`, ...), `log` and `tokens` by stage, `last` those of its final
    model. `faults` are sentences about what could not be read.
    """

    name: str
    seed: int | None = None
    failed: str = ""
    scores: Mapping[str, SystemScores] = field(default_factory=dict)
    last: SystemScores = field(default_factory=dict)
    log: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    curve: Sequence[CurvePoint] = ()
    rows_hash: str = ""
    faults: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """What one colour stands for: an arm with its runs, one a seed, or a single run. `index` says which colour."""

    name: str
    runs: Sequence[ReportedRun]
    index: int = 0
    arm: Arm = field(default_factory=Arm)

    @property
    def finished(self) -> list[ReportedRun]:
        """The runs that did not fail."""
        return [run for run in self.runs if not run.failed]


@dataclass(frozen=True)
class Source:
    """What is compared with each other: the arms of a comparison, or single runs, for which `comparison` is None.

    `changes` are the differences to the `control`. `notes` are sentences about what could not be compared.
    """

    series: Sequence[Series]
    control: str = ""
    comparison: ComparisonFile | None = None
    changes: Sequence[Change] = ()
    notes: Sequence[str] = ()


def read_sources(folders: Sequence[Path]) -> list[Source]:
    """What is in `folders`: a source for each comparison, and one for all runs together, numbered through.

    Raises AnchorvecError for a folder that is neither, and for a file that cannot be read.
    """
    folders = [user_path(folder) for folder in folders]
    comparisons = [folder for folder in folders if (folder / COMPARISON).is_file()]
    runs = [read_run(folder) for folder in folders if folder not in comparisons]
    named = unlike([run.name for run in runs])
    sources = [_comparison(folder) for folder in comparisons]
    if runs:
        series = [Series(name, [run]) for name, run in zip(named, runs, strict=True)]
        sources.append(Source(series, control=series[0].name))
    return _numbered(sources)


def _numbered(sources: Sequence[Source]) -> list[Source]:
    """`sources` whose series each have an index of their own."""
    numbered, count = [], 0
    for source in sources:
        series = [replace(one, index=count + i) for i, one in enumerate(source.series)]
        count += len(series)
        numbered.append(replace(source, series=series))
    return numbered


def unlike(names: Sequence[str]) -> list[str]:
    """`names` with a number behind each one that was there before."""
    return [f"{name} ({n + 1})" if (n := names[:i].count(name)) else name for i, name in enumerate(names)]


def _comparison(folder: Path) -> Source:
    file = folder / COMPARISON
    content = _validated(ComparisonFile, file)
    series = [
        Series(name, [_run_of_arm(folder, run) for run in arm.runs], arm=arm) for name, arm in content.arms.items()
    ]
    return Source(series, content.control, content, content.differences)


def _run_of_arm(comparison: Path, entry: ArmRun) -> ReportedRun:
    """A run of an arm: what its folder says, with what the comparison's file says over it."""
    folder = comparison / entry.folder
    known = _is_run(folder) if entry.folder else False
    of_folder = read_run(folder) if known else ReportedRun(entry.folder)
    said = {
        "minutes": entry.minutes,
        "tokens": entry.tokens,
        "steps": entry.steps,
        "last": entry.scores,
        "curve": entry.curve,
        "rows_hash": entry.rows_hash,
    }
    values = {**vars(of_folder), **{key: value for key, value in said.items() if value}}
    return ReportedRun(**(values | {"name": entry.folder, "seed": entry.seed, "failed": entry.failed}))


def _is_run(folder: Path) -> bool:
    run = Run(folder)
    return run.record.is_file() or run.recipe.is_file()


def read_run(folder: Path) -> ReportedRun:
    """The run in `folder`, finished or not. Raises AnchorvecError if there is none, or a file cannot be read."""
    run = Run(folder)
    if not _is_run(folder):
        raise AnchorvecError(
            f"{folder}: neither a run nor a comparison; name a folder with {run.record.name} or {COMPARISON} in it"
        )
    log, faults = _log(run)
    record = _json(run.record)
    scores = _validated(dict[str, dict[str, TaskScores]], run.scores) if run.scores.is_file() else {}
    result = _json(run.result)
    lasts = {stage: records[-1] for stage, records in log.items()}
    seconds = sum(last.get("seconds", 0.0) for last in lasts.values())
    return ReportedRun(
        name=folder.resolve().name,
        seed=record.get("seed"),
        scores=scores,
        last=next((scores[stage] for stage in reversed(STAGES) if stage in scores), {}),
        log=log,
        record=record,
        recipe=_recipe(run),
        result=result,
        minutes=result.get("minutes") or (seconds / 60 if seconds else None),
        tokens={stage: last["tokens"] for stage, last in lasts.items() if "tokens" in last},
        steps={stage: last["step"] for stage, last in lasts.items()},
        curve=_validated(_Record, run.record).curve if run.record.is_file() else (),
        faults=faults,
    )


def _log(run: Run) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The records of the log by stage, and what is wrong with it: the last line of a killed run may be cut."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    if not run.log.is_file():
        return {}, []
    try:
        for place, row in read_json_lines(run.log):
            if not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
                raise AnchorvecError(f"{place}: this is no record of a step")
            if "scores" not in row:  # on the way, which the record has too
                by_stage.setdefault(row["stage"], []).append(row)
    except AnchorvecError as error:
        return by_stage, [f"{run.folder.name}: the log is read up to {str(error).removeprefix(f'{run.folder}/')}"]
    return by_stage, []


def _recipe(run: Run) -> dict[str, Any]:
    if not run.recipe.is_file():
        return {}
    try:
        found = parse(run.recipe.read_text(encoding="utf-8"), str(run.recipe))
    except (OSError, UnicodeDecodeError) as error:
        raise AnchorvecError(f"{run.recipe} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no such file."""
    return _validated(dict[str, Any], file) if file.is_file() else {}


def _validated(form: type[T], file: Path) -> T:
    """What `file` holds, of the given `form`. Raises AnchorvecError with its place for anything else."""
    try:
        return TypeAdapter(form).validate_python(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise AnchorvecError(f"{file}: {place}: {first['msg']}; was the file changed by hand?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AnchorvecError(f"{file} cannot be read: {error}") from None
