"""The runs of a comparison: each is the pipeline with an arm's recipe and its budget, on the same rows."""

import gc
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from anchorvec.comparing.asked import Amount
from anchorvec.comparing.sharing import Made, make_base, take_over
from anchorvec.data import Pairs
from anchorvec.data.stage_inputs import StageInputs, stage_inputs
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import LocalData
from anchorvec.pipeline import run_stages
from anchorvec.recipe import Recipe
from anchorvec.resuming import as_begun
from anchorvec.run import STAGES, Run
from anchorvec.training.budget import STAGE_ONE_SHARE
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.tokens import sampled_pairs, tokens_of_a_step


@dataclass(frozen=True)
class Finished:
    """What a run came to: its folder, decoder tokens and steps by stage, and the scores of its last model by test set.

    `minutes` is wall time, scoring and export included, without interruptions.
    """

    run: Run
    tokens: dict[str, int]
    steps: dict[str, int]
    minutes: float
    scores: dict[str, dict[str, Any]]


@dataclass
class Runs:
    """Makes runs in `folder` on the data sets `pairs`; `command` is what to type to go on where one is interrupted.

    `made` are those that were begun, of which later ones take over what is the same.
    """

    folder: Path
    pairs: Mapping[str, Pairs]
    command: Sequence[str]
    made: list[Made] = field(default_factory=list)

    def run(self, place: str, recipe: Recipe, amount: Amount, tests: Sequence[LocalData]) -> Finished:
        """Run `recipe` in the folder `place` for so large an `amount`, scored on `tests` and the tasks that it names.

        What is there already stays. Raises AnchorvecError where the run cannot be made.
        """
        run, began = Run(self.folder / place), time.monotonic()
        recipe = recipe.model_copy(update={"output": run.folder})
        inputs = stage_inputs(recipe, self.pairs)
        made = Made(run, recipe, replace(amount.budget(STAGE_ONE_SHARE), began=began), _scored_on(recipe, tests))
        make_base(made, self.made)
        share = stage_one_share(recipe, inputs, run.base)
        made = replace(made, budget=replace(made.budget, stage_one_share=share))
        take_over(made, self.made)
        self.made.append(made)
        as_it_began, budget = as_begun(run, recipe, made.budget)
        result = run_stages(as_it_began, run, inputs, tests, budget=budget, command=shlex.join(self.command))
        return Finished(run, run.tokens(), run.steps(), result.minutes, scores_of(run, *reversed(STAGES)))

    def remember(self, place: str, recipe: Recipe, amount: Amount, tests: Sequence[LocalData]) -> None:
        """Have later runs take over from a finished one; `place`, `recipe`, `amount` and `tests` are as in `run`."""
        run = Run(self.folder / place)
        share = run.noted("budget").get("stage_one_share")
        if share is not None:
            recipe = recipe.model_copy(update={"output": run.folder})
            self.made.append(Made(run, recipe, amount.budget(share), _scored_on(recipe, tests)))


def _scored_on(recipe: Recipe, tests: Sequence[LocalData]) -> tuple[str, ...]:
    return (*(test.name for test in tests), *recipe.evaluation.tasks)


def stage_one_share(recipe: Recipe, inputs: StageInputs, base: Path) -> float:
    """The part of the tokens that Stage I has by the steps of `recipe`, which reads `inputs`; 0 or 1 of a single stage.

    `base` is its untrained embedder.
    """
    if len(recipe.stages) == 1:
        return 1.0 if recipe.stage_one is not None else 0.0
    batch = sampled_pairs(recipe, inputs, AutoTokenizer.from_pretrained(base))
    of_step = tokens_of_a_step(recipe, inputs, batch)
    tokens = {name: of_step[name] * getattr(recipe, name).steps for name in recipe.stages}
    return float(tokens["stage_one"] / sum(tokens.values()))


def scores_of(run: Run, *systems: str) -> dict[str, dict[str, Any]]:
    """The scores by test set of the first of `systems` that has some in `run`, as its file has them; else empty."""
    if not run.scores.is_file():
        return {}
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(run.scores.read_text(encoding="utf-8"))
    return next((found[system] for system in systems if system in found), {})


def reason(error: Exception) -> str:
    """Why a run failed with `error`, in a line; what it held in memory is freed."""
    words = " ".join(str(error).split())
    error.__traceback__ = None
    gc.collect()
    release_freed_memory()
    return words if isinstance(error, AnchorvecError) else f"{type(error).__name__}: {words}"
