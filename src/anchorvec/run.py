"""A run: the folder of one training, where each thing lies in it, and its record."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from anchorvec.errors import AnchorvecError
from anchorvec.files import remove_scratch, write_json, write_text, writing

StageName = Literal["stage_one", "stage_two"]

STAGES: tuple[StageName, ...] = ("stage_one", "stage_two")
"""The stages, in their order: names of recipe sections, of folders in a run, and in its log and scores."""

STAGE_TITLES: dict[StageName, str] = {"stage_one": "Stage I", "stage_two": "Stage II"}

SYSTEM_TITLES: dict[str, str] = {
    "bm25": "BM25",
    "untrained": "untrained",
    **{str(name): f"after {title}" for name, title in STAGE_TITLES.items()},
}
"""What tables call a system: the keys of a run's scores."""


@dataclass(frozen=True)
class Run:
    """The run in `folder`: `base` and a folder for each stage, each an embedder and the start of the next one.

    Beside them the resolved recipe, the record (versions, machine, data, engine), the log, the scores, and `model`,
    which is the export. A folder is there whole or not at all.
    """

    folder: Path

    @property
    def base(self) -> Path:
        """The untrained embedder."""
        return self.folder / "base"

    def stage(self, name: StageName) -> Path:
        """What the stage `name` trains: an embedder, or an adapter over the folder that it started from."""
        return self.folder / name

    def checkpoints(self, name: StageName) -> Path:
        """The folder of the checkpoints of the stage `name`; it is there until the stage is."""
        return self.folder / "checkpoints" / name

    def stage_after(self, name: StageName, step: int) -> Path:
        """What the stage `name` had trained after the step `step`: there while it is scored, and if it is the best."""
        return self.folder / f"{name}_step_{step}"

    @property
    def model(self) -> Path:
        """The export."""
        return self.folder / "model"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, as YAML."""
        return self.folder / "recipe.yaml"

    @property
    def record(self) -> Path:
        """What a reader needs to repeat the run, as JSON."""
        return self.folder / "run.json"

    @property
    def log(self) -> Path:
        """A record for each logged step, as JSON Lines."""
        return self.folder / "log.jsonl"

    @property
    def rows(self) -> Path:
        """For each stage, and after each of its steps, a hash of the rows that were trained on so far, as JSON."""
        return self.folder / "rows.json"

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard shows, where the recipe asks for it."""
        return self.folder / "tensorboard"

    @property
    def not_finite(self) -> Path:
        """The rows of a step whose loss was no finite number, as JSON Lines."""
        return self.folder / "not_finite.jsonl"

    @property
    def scores(self) -> Path:
        """The scores by stage and task, as JSON."""
        return self.folder / "scores.json"

    @property
    def pairs(self) -> Path:
        """The training pairs that the quickstart made, as JSON Lines."""
        return self.folder / "pairs.jsonl"

    @property
    def score_set(self) -> Path:
        """The score set that the quickstart made, in BEIR layout."""
        return self.folder / "score_set"

    @property
    def score_set_part(self) -> Path:
        """A part of it, on which the models on the way are scored."""
        return self.folder / "score_set_part"

    @property
    def result(self) -> Path:
        """What the quickstart found, as JSON."""
        return self.folder / "result.json"

    @classmethod
    def create(cls, output: Path | None) -> "Run":
        """A new run in the folder `output`, which is made.

        Raises AnchorvecError where there is none, where it cannot be made, and rather than write into a used folder.
        """
        if output is None:
            raise AnchorvecError("output: the recipe names no folder for the run; add output=FOLDER")
        run = cls(output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            help_ = "name a new folder"
            if run.recipe.is_file() and not run.model.is_dir():
                help_ = "it holds a run that did not finish: go on with --resume (in Python: resume=True), or " + help_
            raise AnchorvecError(f"output: {output} is in use; {help_}")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnchorvecError(f"output: {output} cannot be made: {error.strerror}") from error
        _check_writable(output)
        return run

    @classmethod
    def resume(cls, output: Path | None) -> "Run":
        """The run in the folder `output`, which may have been killed at any moment; a new one where nothing is there.

        Raises AnchorvecError where there is no folder, where it cannot be made, and if it holds something else.
        """
        if output is None or not output.is_dir():
            return cls.create(output)
        found = cls(output)
        others = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        before = {found.pairs.name, found.score_set.name, found.score_set_part.name}  # the quickstart's
        if not found.recipe.is_file() and others - before:
            raise AnchorvecError(f"output: {output} is in use, and no run is in it; name a run's folder, or a new one")
        _check_writable(output)
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context that only one process at a time can be in. Raises AnchorvecError where another one is.

        What such a process has left behind that was killed is removed.
        """
        lock = FileLock(self.folder / ".lock")
        with writing(self.folder):
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                message = f"output: another process is at work in {self.folder}; wait for it, or end it"
                raise AnchorvecError(message) from error
        try:
            remove_scratch(self.folder)
            yield
        finally:
            with suppress(OSError):
                Path(lock.lock_file).unlink()  # filelock sees that a file which it locked is gone
            lock.release()

    def start_of(self, name: StageName) -> Path | None:
        """The newest embedder that stands before the stage `name`; None: there is none."""
        before = [self.stage(earlier) for earlier in reversed(STAGES[: STAGES.index(name)])]
        return next((folder for folder in [*before, self.base] if is_embedder(folder)), None)

    def newest(self) -> Path | None:
        """The embedder folder of the newest stage that is there whole, or the base; None: there is none."""
        folders = [*(self.stage(name) for name in reversed(STAGES)), self.base]
        return next((folder for folder in folders if is_embedder(folder)), None)

    def note(self, key: str, value: dict[str, Any]) -> None:
        """Add the entries of `value` to those under `key` in the record."""
        write_json(self.record, self.read_record() | {key: {**self.noted(key), **value}})

    def noted(self, key: str) -> dict[str, Any]:
        """The entries under `key` in the record; empty where there are none yet."""
        found: dict[str, Any] = self.read_record().get(key, {})
        return found

    def curve(self) -> list[dict[str, Any]]:
        """The scores on the way: `stage`, `step` and `scores`, by test set, in the order of training."""
        found: list[dict[str, Any]] = self.read_record().get("curve", [])
        return found

    def add_to_curve(self, name: StageName, step: int, scores: dict[str, float]) -> None:
        """Note the `scores` by test set of the model after the step `step` of the stage `name`."""
        before = [point for point in self.curve() if (point["stage"], point["step"]) != (name, step)]
        points = [*before, {"stage": name, "step": step, "scores": scores}]
        points.sort(key=lambda point: (STAGES.index(point["stage"]), point["step"]))
        write_json(self.record, self.read_record() | {"curve": points})

    def read_record(self) -> dict[str, Any]:
        """The record; empty where there is none yet."""
        found: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        return found

    def note_rows(self, name: StageName, hashes: Sequence[int]) -> None:
        """Write down the `hashes` of the rows of the stage `name`, one a step."""
        write_json(self.rows, self.read_rows() | {name: [f"{number:016x}" for number in hashes]})

    def read_rows(self) -> dict[str, list[str]]:
        """The hashes of the rows by stage; empty where no stage is finished."""
        found: dict[str, list[str]] = json.loads(self.rows.read_text(encoding="utf-8")) if self.rows.exists() else {}
        return found

    def remove_checkpoints(self, name: StageName) -> None:
        """Remove the checkpoints of the stage `name`, which is finished."""
        folder = self.checkpoints(name)
        if folder.is_dir():
            shutil.rmtree(folder)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    def cut_log(self, name: StageName, step: int) -> None:
        """Take out of log and curve what comes after the step `step` of the stage `name`, and a line cut short."""
        place_of = STAGES.index(name), step
        curve = self.curve()
        if points := [point for point in curve if (STAGES.index(point["stage"]), point["step"]) > place_of]:
            write_json(self.record, self.read_record() | {"curve": [point for point in curve if point not in points]})
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last one, in whose midst the process was killed
                continue
            place = STAGES.index(record["stage"]), record["step"]
            if place <= place_of:
                kept.append(f"{line}\n")
        write_text(self.log, "".join(kept))

    def steps(self) -> dict[str, int]:
        """The last logged step of each stage."""
        return {stage: record["step"] for stage, record in self.last_records().items()}

    def tokens(self) -> dict[str, int]:
        """The decoder tokens of each stage until its last logged step."""
        return {stage: record["tokens"] for stage, record in self.last_records().items() if "tokens" in record}

    def last_records(self) -> dict[str, dict[str, Any]]:
        """The last record of each stage in the log; empty where there is none."""
        found = {}
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []:
            with suppress(ValueError):  # of the last line, in whose midst the process was killed
                record = json.loads(line)
                found[record["stage"]] = record
        return found


def _check_writable(output: Path) -> None:
    if not os.access(output, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise AnchorvecError(f"output: {output} cannot be written; name a folder of your own on a disk that can be")


def is_embedder(folder: Path) -> bool:
    """Whether the folder holds an embedder, whole or as an adapter."""
    return (folder / "modules.json").is_file()
