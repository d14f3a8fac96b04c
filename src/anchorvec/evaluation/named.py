"""The tasks of mteb that were asked for by name: which have a result, which have data, and a run of the others."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import _mteb, _mteb_names, _mteb_results
from anchorvec.evaluation.averages import Averages
from anchorvec.model.loading import name_and_revision
from anchorvec.terminal import say

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_NAMES_IN_A_LINE = 60


class NamedTasks:
    """Tasks by name, and their outcomes, as far as there are any: those that are kept from the start."""

    def __init__(
        self,
        names: Sequence[str],
        languages: Sequence[str],
        *,
        model: "SentenceTransformer | str | Path",
        results: str | Path | None,
        instruction: str | None,
    ) -> None:
        """Find the tasks `names` in `languages`, and what is kept of them in the folder `results`.

        It is kept by `model` and `instruction`. Raises AnchorvecError for an unknown name, a model that is in memory
        alone, where results are to be kept, and a folder that cannot be used.
        """
        self._groups = _mteb_names.groups(names, languages)
        for note in _mteb_names.notes(self._groups, languages):
            say(note)
        self.tasks = _mteb_names.tasks_of(self._groups)
        self.outcomes: dict[str, _mteb.Outcome] = {}
        self._kept = None
        if results is not None and self.tasks:
            if not isinstance(model, str | Path):
                raise AnchorvecError("results are kept by a hash of the model's folder; name the folder, or its hub id")
            self._kept = _mteb_results.Kept(results, name_and_revision(model), instruction)
            self.outcomes = self._kept.outcomes(self.tasks)
        if self.outcomes:
            of = f"{len(self.outcomes)} of {len(self.tasks)} tasks"
            say(f"{of} have a result in {results} and are not run again: {_listed(list(self.outcomes))}")

    @property
    def to_run(self) -> dict[str, Any]:
        """The tasks without an outcome, by name."""
        return {name: task for name, task in self.tasks.items() if name not in self.outcomes}

    def network(self) -> AbstractContextManager[None]:
        """A context that does without network where there is none; a line says so, if any task is to be run."""
        return _mteb_names.offline_unless_reachable() if self.to_run else nullcontext()

    def leave_out_without_data(self, *, alone: bool) -> None:
        """Fetch the data of the tasks to be run, and leave out those whose data cannot be had, with a warning.

        Raises AnchorvecError if no task is left, and they stand `alone`, without local data to score on.
        """
        missing: dict[str, list[str]] = {}
        to_load = {}
        for name, task in self.to_run.items():
            parts = [part for part in _mteb_names.parts(task) if self._kept is None or not self._kept.outcome(part)]
            to_load[name] = [part for part in parts if not part.data_loaded]
        if count := sum(map(len, to_load.values())):
            say(f"fetching the data of MTEB tasks: {count}")
        for name, parts in to_load.items():
            for reason in list(_mteb_names.without_data(parts).values())[:1]:
                missing.setdefault(reason, []).append(name)
        if not missing:
            return
        reasons = "; ".join(f"{_listed(names)} ({reason})" for reason, names in missing.items())
        for name in [name for names in missing.values() for name in names]:
            del self.tasks[name]
        if alone and not self.tasks:
            raise AnchorvecError(f"none of the tasks can be scored, as their data cannot be had: {reasons}")
        warnings.warn(f"left out, as their data cannot be had: {reasons}", stacklevel=4)

    def outcome(self, name: str, model: Any, about: Mapping[str, Any], **options: Any) -> _mteb.Outcome:
        """The outcome of the task `name`: what is kept, or that of a run of `model`, which encodes with `options`.

        `about` are fields of its scores that are kept with it.
        """
        if name not in self.outcomes:
            self.outcomes[name] = _mteb_results.run(model, self.tasks[name], self._kept, about, **options)
        return self.outcomes[name]

    def averages(self) -> dict[str, Averages]:
        """Of each benchmark or type that has several tasks, by name."""
        results = {name: outcome.result for name, outcome in self.outcomes.items()}
        return {group.name: _mteb_names.averages(group, results) for group in self._groups if len(group.tasks) > 1}


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_LINE
    return ", ".join(names[:_NAMES_IN_A_LINE]) + (f" and {more} more" if more > 0 else "")
