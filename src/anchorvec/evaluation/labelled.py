"""Test sets that are one file of rows: sentence pairs with scores, texts with labels, candidates of a query.

A set is `NAME.jsonl`, plain or gzipped. Which kind it is of is told by the fields of its rows, as is which rows are
scored: where they have a `split`, those of `test`, and classifiers learn from those of `train`.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.task_kind import SubsetScores
from anchorvec.files import read_json_lines, without_surrogates

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class RowsData:
    """The rows of a test set, with the fields that its kind has; `train` are those that classifiers learn from."""

    name: str
    rows: list[dict[str, Any]]
    train: tuple[dict[str, Any], ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all rows in their order, as hexadecimal digits; not of the name."""
        digest = hashlib.sha256()
        for part in (self.rows, self.train):
            for row in part:
                digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()


def is_rows_file(path: Path) -> bool:
    """Whether `path` is a file of rows by its name."""
    return path.is_file() and path.name.endswith(SUFFIXES)


def has_fields(path: Path, *fields: str) -> bool:
    """Whether the first row of the file `path` has all `fields`; not if it cannot be read."""
    if not is_rows_file(path):
        return False
    try:
        return all(field in row for _, row in islice(read_json_lines(path), 1) for field in fields)
    except AnchorvecError:
        return False


def splits_of(path: Path, most: int = 200_000) -> set[str]:
    """The splits that the first `most` rows of the file `path` name."""
    return {str(row["split"]) for _, row in islice(read_json_lines(path), most) if "split" in row}


def set_name(path: Path) -> str:
    """What results call the set in `path`: the file's name without its ending."""
    return without_surrogates(path.resolve().name.removesuffix(".gz").removesuffix(".jsonl"))


def read_rows(path: Path, fields: Mapping[str, type], split: str | None = None) -> list[dict[str, Any]]:
    """The rows of the file `path` with `fields` of these types (`list`: of texts; `float`: any number).

    Of a file whose rows name a split those of `split` only, by default `test` where there is one. Lone surrogates are
    replaced, and counted in a warning. Raises AnchorvecError with `file:line` for a row that cannot be used, and if
    none is left.
    """
    found, mended = [], 0
    splits = splits_of(path)
    wanted = split or ("test" if "test" in splits else None)
    for place, row in read_json_lines(path):
        if wanted is not None and row.get("split") != wanted:
            continue
        kept = {name: _value(row, name, kind, place) for name, kind in fields.items()}
        whole = {name: _mended(value) for name, value in kept.items()}
        mended += whole != kept
        found.append(whole)
    if mended:
        warnings.warn(f"{set_name(path)}: rows with half a surrogate pair, read as U+FFFD: {mended:,}", stacklevel=3)
    if not found:
        raise AnchorvecError(f"{path}: there is no row{f' of the split {wanted}' if wanted else ''} in it")
    return found


def _value(row: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    value = row.get(name)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(value)
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if kind is list and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return list(value)
    asked = {float: "a number", str: "a text", list: "a list of texts"}[kind]
    raise AnchorvecError(f"{place}: {name} is {json.dumps(value)[:60]}; it must be {asked}")


def _mended(value: Any) -> Any:
    if isinstance(value, list):
        return [without_surrogates(text) for text in value]
    return without_surrogates(value) if isinstance(value, str) else value


def predictions(task: Any, read: Any) -> list[SubsetScores]:
    """What `read` makes of the predictions that mteb writes of a run of `task`: filled while it runs.

    `read(predictions, scores, split, subset)` gives the SubsetScores of one subset; `scores` are what mteb computed.
    """
    found: list[SubsetScores] = []
    own = task.evaluate

    def evaluate(model: Any, split: str = "test", *args: Any, **options: Any) -> Any:
        with TemporaryDirectory() as folder:
            scores = own(model, split, *args, **{**options, "prediction_folder": Path(folder)})
            for of_subset in _written(Path(folder), split):
                found.append(read(of_subset[1], scores[of_subset[0]], split, of_subset[0]))
        return scores

    task.evaluate = evaluate
    return found


def _written(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Each subset, and its predictions of a split."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for subset, of_split in content.items():
            if isinstance(of_split, dict) and split in of_split:
                yield subset, of_split[split]
