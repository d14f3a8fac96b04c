"""A run: the folder of one training, where each thing lies in it, and its record."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anchorvec.errors import AnchorvecError
from anchorvec.files import write_json

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
            if run.base.is_dir() and not run.model.is_dir():
                help_ = "it holds a run that did not finish; delete it, or name a new folder"
                first = run.stage("stage_one")
                if first.is_dir():
                    help_ += f" and go on from its Stage I with model.base={first} stage_one=null"
            raise AnchorvecError(f"output: {output} is in use; {help_}")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnchorvecError(f"output: {output} cannot be made: {error.strerror}") from error
        return run

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
        record = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        write_json(self.record, record | {key: {**record.get(key, {}), **value}})

    def steps(self) -> dict[str, int]:
        """The last logged step of each stage."""
        records = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return {record["stage"]: record["step"] for record in records}


def is_embedder(folder: Path) -> bool:
    """Whether the folder holds an embedder, whole or as an adapter."""
    return (folder / "modules.json").is_file()
