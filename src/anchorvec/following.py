"""Several processes in one run: the first one does the run, and the others take part in its stages.

The first process reads the recipe, scores, writes and prints. For each stage it gives the others a task through the
store of the launcher, and all train it. Between stages they wait for the next task, however long that takes.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from anchorvec.data.stage_inputs import StageInputs
from anchorvec.errors import AnchorvecError
from anchorvec.interrupts import Interrupts
from anchorvec.processes import join
from anchorvec.ranks import rank, ranks
from anchorvec.recipe import Recipe
from anchorvec.run import Run
from anchorvec.training.budget import Limit
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import train_stage_one
from anchorvec.training.stage_two import train_stage_two

_RUNS = itertools.count()
"""The runs that these processes make, one after another."""

_SECONDS_BETWEEN_LOOKS = 0.1

_SECONDS_FOR_THE_FIRST = 10.0
"""In which the first process tells of an error that all have."""


class Tasks:
    """What the first process gives the others to do, in order."""

    def __init__(self) -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(minutes=5))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"anchorvec {next(_RUNS)}", store)  # type: ignore[attr-defined]
        self._number = 0

    def give(self, task: dict[str, Any]) -> None:
        """Add `task`, plain JSON values."""
        self._store.set(f"task {self._number}", json.dumps(task))
        self._number += 1

    def take(self, seconds: float | None = None) -> dict[str, Any]:
        """The next task, waited for; after so many `seconds`, if any, an empty one."""
        key, start = f"task {self._number}", time.monotonic()
        while not self._store.check([key]):  # a wait within the store would hold signals back
            if seconds is not None and time.monotonic() - start > seconds:
                return {}
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self._number += 1
        task: dict[str, Any] = json.loads(self._store.get(key))
        return task


class Followers:
    """The other processes, as the first one sees them; nobody where it is alone."""

    def __init__(self) -> None:
        self._tasks: Tasks | None = None
        self.result: dict[str, Any] | None = None
        """What the run made, as plain JSON values, once it is there; they are told."""

    @contextmanager
    def led(self) -> Iterator[None]:
        """A context in which they wait for tasks; they are let go when it ends, however it does."""
        if ranks() == 1:
            yield
            return
        join()
        self._tasks = Tasks()
        try:
            yield
        finally:
            self._tasks.give({"result": self.result})

    def train(self, stage: Stage) -> None:
        """Train `stage`, with all of them."""
        if self._tasks is not None:
            limit = None if stage.limit is None else {"tokens": stage.limit.tokens}
            task = {"name": stage.name, "recipe": stage.recipe.model_dump(mode="json"), "limit": limit}
            paths = {"run": stage.run.folder, "start": stage.start, "checkpoint": stage.checkpoint}
            self._tasks.give(task | {key: path and str(path.absolute()) for key, path in paths.items()})
        train_stage(stage)


def _first_ones_clock() -> float:
    """A deadline that does not come: it is the first one's that counts."""
    return time.monotonic() + 1e6


def follow(load: Callable[[Recipe], StageInputs]) -> dict[str, Any]:
    """Take part in the stages of the run of the first process, until it ends; what that has made, as `result`.

    `load` reads the data of a recipe. Raises AnchorvecError where something goes wrong in this process alone, and
    SystemExit, without a word, where it went wrong in the first one, which tells.
    """
    join()
    tasks = Tasks()
    inputs = None
    while "name" in (task := tasks.take()):
        recipe = Recipe.model_validate(task["recipe"])
        inputs = inputs or load(recipe)
        checkpoint = task["checkpoint"] and Path(task["checkpoint"])
        limit = None if task["limit"] is None else Limit(_first_ones_clock, task["limit"]["tokens"])
        with Interrupts("") as interrupts:
            stage = Stage(
                task["name"],
                recipe,
                Run(Path(task["run"])),
                Path(task["start"]),
                inputs,
                limit=limit,
                checkpoint=checkpoint,
                interrupts=interrupts,
            )
            try:
                train_stage(stage)
            except AnchorvecError as error:
                task = tasks.take(_SECONDS_FOR_THE_FIRST)
                if "result" not in task:
                    raise AnchorvecError(f"process {rank()} of {ranks()}: {error}") from error
                break
    if task["result"] is None:
        raise SystemExit(2)
    result: dict[str, Any] = task["result"]
    return result


def train_stage(stage: Stage) -> None:
    """Train `stage` in this process."""
    (train_stage_one if stage.name == "stage_one" else train_stage_two)(stage)


def check_shares(recipe: Recipe, processes: int) -> None:
    """Raise AnchorvecError where Stage II of `recipe` cannot be shared out among so many `processes`.

    It needs as many pairs for each, and no generation. A step of Stage I can always be.
    """
    if processes > 1 and recipe.stage_two is not None and recipe.stage_two.generation_weight:
        raise AnchorvecError(
            "stage_two.generation_weight: documents are written beside the contrastive loss by one process alone yet; "
            "start one, or set it to 0"
        )
    pairs = recipe.stage_two.pairs_per_step if recipe.stage_two is not None else 0
    if pairs % processes:
        near = [n for n in (pairs // processes * processes, (pairs // processes + 1) * processes) if n]
        raise AnchorvecError(
            f"stage_two.pairs_per_step: {pairs} pairs are not so many for each of {processes} devices; set it to "
            f"{' or '.join(map(str, near))}, or use another number of devices"
        )
