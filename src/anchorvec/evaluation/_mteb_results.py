"""Results of mteb's tasks, kept in mteb's own form and folder, so that no task is run twice on the same model.

FOLDER/results/MODEL/REVISION/TASK.json     as `mteb.ResultCache(FOLDER)` writes and reads them
FOLDER/per_item/MODEL/REVISION/TASK.json    ours beside it: the scores of each item
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mteb
from mteb.models import ModelMeta

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import _mteb
from anchorvec.evaluation._mteb_names import fresh, parts
from anchorvec.evaluation.task_kind import SubsetScores
from anchorvec.files import user_path, write_json


class Kept:
    """The results of one model in a folder.

    Raises AnchorvecError for a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, model: tuple[str, str], instruction: str | None = None) -> None:
        """`model` is its name, which has a slash, and its revision; `instruction` makes it an experiment of mteb's."""
        self.folder = user_path(folder)
        name, revision = model
        experiment = None if instruction is None else {"instruction": instruction}
        self._named = {"name": name, "revision": revision, "experiment_kwargs": experiment}
        try:
            self._cache = mteb.ResultCache(self.folder)
            with TemporaryDirectory(dir=self.folder):
                pass
        except OSError as error:
            raise AnchorvecError(
                f"results: {self.folder} cannot be written ({error.strerror}); name another"
            ) from error

    def outcome(self, task: Any) -> _mteb.Outcome | None:
        """What is kept of `task`; None if there is no result of all its splits and subsets.

        Raises AnchorvecError for a file that cannot be read.
        """
        path = self._path(task)
        try:
            result = self._cache.load_task_result(task.metadata.name, self._described())
            if result is None or result.get_missing_evaluations(task):
                return None
            items = self._items(path)
        except (OSError, ValueError) as error:
            raise AnchorvecError(f"{path}, or what is kept beside it, cannot be read; delete it ({error})") from error
        by_mteb = {"device": "unknown", "dtype": "unknown", "seconds": result.evaluation_time or 0.0}
        outcome = outcome_of(task, result, [SubsetScores(**part) for part in items.get("subsets", [])])
        return replace(outcome, about=by_mteb | items.get("about", {}))

    def outcomes(self, tasks: Mapping[str, Any]) -> dict[str, _mteb.Outcome]:
        """What is kept of each of `tasks`, by name, as far as there is a result."""
        found = {name: self.outcome(task) for name, task in tasks.items()}
        return {name: outcome for name, outcome in found.items() if outcome is not None}

    def save(self, task: Any, outcome: _mteb.Outcome, model: Any, encode_kwargs: Mapping[str, Any]) -> None:
        """Keep the `outcome` of `task` beside what is there of other splits and subsets; each file appears whole.

        `model` is what mteb ran, `encode_kwargs` the options that it encoded with. Raises AnchorvecError if a file
        cannot be written.
        """
        path = self._path(task)
        before = self._cache.load_task_result(task.metadata.name, self._described())
        result, subsets = outcome.result, [asdict(part) for part in outcome.subsets]
        if before is not None and before.is_mergeable(result):
            result = before.merge(result)
            new = {(part["split"], part["subset"]) for part in subsets}
            old = self._items(path).get("subsets", [])
            subsets = [part for part in old if (part["split"], part["subset"]) not in new] + subsets
        write_json(self._beside(path), {"about": dict(outcome.about), "subsets": subsets})
        try:
            self._save(path, result, model.mteb_model_meta.model_copy(update=self._named), encode_kwargs)
        except OSError as error:
            raise AnchorvecError(f"{path} cannot be written: {error.strerror}") from error

    def _save(self, path: Path, result: Any, meta: ModelMeta, encode_kwargs: Mapping[str, Any]) -> None:
        """Have mteb write into a scratch folder, and move each file from there."""
        with TemporaryDirectory(dir=self.folder) as folder:
            scratch = mteb.ResultCache(folder)
            written = scratch.get_task_result_path(result.task_name, meta).parent
            written.mkdir(parents=True)
            settings = path.with_name("run_settings.jsonl")  # of all tasks: mteb adds to it
            if settings.is_file():
                shutil.copy(settings, written)
            scratch.save_to_cache(result, meta, encode_kwargs=encode_kwargs)
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in sorted(written.iterdir(), key=lambda file: file.name == path.name):  # the result last
                file.replace(path.with_name(file.name))

    def _described(self) -> ModelMeta:
        return ModelMeta.create_empty(overwrites=self._named)

    def _path(self, task: Any) -> Path:
        return Path(self._cache.get_task_result_path(task.metadata.name, self._described()))

    def _beside(self, path: Path) -> Path:
        return self.folder / "per_item" / path.relative_to(self.folder / "results")

    def _items(self, path: Path) -> dict[str, Any]:
        """What is kept beside the result `path`; empty where nothing is, as of results that mteb itself wrote."""
        beside = self._beside(path)
        return dict(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else {}


def outcome_of(task: Any, result: Any, subsets: Iterable[SubsetScores] = ()) -> _mteb.Outcome:
    """The outcome of `task` by mteb's `result`, which may have splits and subsets that `task` does not name.

    Of `subsets` those that it names; none where one is missing.
    """
    own = result.validate_and_filter_scores(task)
    of_part = {(part.split, part.subset): part for part in subsets}
    wanted = [(split, subset) for split in task.eval_splits for subset in task.hf_subsets]
    found = [of_part[part] for part in wanted] if of_part.keys() >= set(wanted) else []
    return _mteb.Outcome(task.metadata.type, float(own.get_score()), found, own)


def run(
    model: Any,
    task: Any,
    kept: Kept | None,
    about: Mapping[str, Any],
    *,
    draw: tuple[int, int] | None = None,
    **options: Any,
) -> _mteb.Outcome:
    """The outcome of `model` on `task`, which is in `kept` afterwards, with what is to be said `about` it.

    A task made of others goes on where it was interrupted. `options` are those that it encodes with, which mteb
    writes beside the result. `draw` is that of `_mteb.run`, and only where nothing is kept.
    """
    if kept is None:
        return _mteb.run(model, fresh(task), draw=draw)
    if task.is_aggregate:
        done = [kept.outcome(part) or run(model, part, kept, about, **options) for part in parts(task)]
        seconds = {"seconds": sum(part.about["seconds"] for part in done)}
        outcome = replace(outcome_of(task, task.combine_task_results([part.result for part in done])), about=seconds)
    else:
        outcome = _mteb.run(model, fresh(task))
    outcome = replace(outcome, about={**about, **outcome.about})
    kept.save(task, outcome, model, options)
    return outcome
