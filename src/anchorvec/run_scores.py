"""Scores of the models of a run: each once, and kept in its folder."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anchorvec.device import devices_of_run, resolve_precision
from anchorvec.evaluation import LocalData, Scores, bm25_scores, evaluate, ranking_sets
from anchorvec.files import write_json
from anchorvec.model.loading import load_encoder
from anchorvec.recipe import Recipe
from anchorvec.run import SYSTEM_TITLES, Run
from anchorvec.terminal import say
from anchorvec.training.budget import Budget, Measured, pace_now
from anchorvec.training.memory import release_freed_memory

Scored = dict[str, dict[str, Scores]]
"""Scores by system, an untrained or a trained model or BM25, and task."""


@dataclass(frozen=True)
class WholeSet:
    """Data that only BM25 and the last stage are scored on, as they take `times` as long as those on the way."""

    data: LocalData
    times: float


def stored_scores(run: Run) -> Scored:
    """The scores that `run` has already, by system and task."""
    if not run.scores.is_file():
        return {}
    return scores_of(json.loads(run.scores.read_text(encoding="utf-8")))


def scores_of(plain: Mapping[str, Mapping[str, Any]]) -> Scored:
    """The scores that `plain_scores` made `plain` of."""
    return {system: {task: Scores.from_dict(v) for task, v in tasks.items()} for system, tasks in plain.items()}


def score_bm25(recipe: Recipe, run: Run, tests: Sequence[LocalData], scores: Scored) -> None:
    """Add the scores of BM25 on `tests` to `scores`, and write all into `run`, where the `recipe` asks for it."""
    if recipe.evaluation.bm25 and not recipe.evaluation.data:
        say("evaluation.bm25: there is no folder in evaluation.data to score it on")
    elif recipe.evaluation.bm25:
        score_model(recipe, run, tests, scores, "bm25", None)


def first_scoring(recipe: Recipe, run: Run, tests: Sequence[LocalData], scores: Scored, *, timed: bool) -> Measured:
    """What scoring the untrained embedder of `run` takes, or took where that is done.

    `recipe`, `tests` and `scores` are as in `score_model`. Where the run is `timed`, no vectors of an earlier one are
    used, and the machine's pace is measured, too: the faster one of before and after.
    """
    if not run.noted("scoring"):
        before = pace_now() if timed else 1.0
        seconds = score_model(recipe, run, tests, scores, "untrained", run.base, cache=not timed)
        took = seconds or sum(of_task.seconds for of_task in scores.get("untrained", {}).values())
        run.note("scoring", asdict(Measured(took, min(before, pace_now()) if timed else 1.0)))
    return Measured(**run.noted("scoring"))


def seconds_of_whole(whole: WholeSet, scores: Scored, system: str) -> float:
    """What scoring on the `whole` takes, by the `scores` of `system` on what it is compared on.

    To load a model takes as long for a set of any size.
    """
    return whole.times * sum(of_task.seconds for of_task in scores[system].values())


def affordable(whole: WholeSet | None, budget: Budget, scores: Scored) -> tuple[WholeSet | None, float]:
    """`whole` with the seconds that scoring on it takes; None and 0 where `budget` has no time for that, which is said.

    They follow from those of the untrained embedder in `scores`.
    """
    seconds = seconds_of_whole(whole, scores, "untrained") if whole else 0.0
    if whole is None or budget.affords(seconds):
        return whole, seconds
    say(f"{whole.data.name}: scoring on the whole of it would take {seconds:.0f} s; left out")
    return None, 0.0


def score_model(
    recipe: Recipe,
    run: Run,
    tests: Sequence[LocalData],
    scores: Scored,
    system: str,
    model: Path | None,
    *,
    tasks: bool = True,
    cache: bool = True,
) -> float:
    """Add the scores of `model` to `scores`, and write all into `run`; the seconds it took, 0 if nothing is scored.

    It is scored as `recipe` says, on `tests`, and with `tasks` on those of MTEB; `system` is what its scores are
    called. What has its scores already keeps them. None: BM25. Without `cache` no kept vectors are used.
    """
    settings = recipe.evaluation
    names = settings.tasks if tasks else []
    before = scores.get(system)
    if not (tests or names) or (before is not None and all(test.name in before for test in tests)):
        return 0.0
    start = time.monotonic()
    say(f"scoring: {SYSTEM_TITLES[system]}")
    release_freed_memory()  # of a finished stage
    if model is None:
        found = {test.name: bm25_scores(test) for test in ranking_sets(tests)}
    else:
        found = _evaluated(recipe, tests, names, model, cache=cache)
    scores[system] = {**(before or {}), **found}
    write_json(run.scores, plain_scores(scores))
    for task, of_task in found.items():
        say(f"  {task}: {of_task.main_score:.3f}")
    return time.monotonic() - start


def _evaluated(
    recipe: Recipe, tests: Sequence[LocalData], names: Sequence[str], model: Path, *, cache: bool = True
) -> dict[str, Scores]:
    """The scores of the embedder folder `model` on `tests` and the tasks `names`.

    Texts are shared out among the devices of the run on this machine.
    """
    settings = recipe.evaluation
    bf16 = resolve_precision(settings.precision) == "bf16"
    return evaluate(
        load_encoder(model, torch.bfloat16 if bf16 else torch.float32),
        data=tests,
        tasks=names,
        batch_size=settings.batch_size,
        cache=cache,
        devices=devices_of_run(),
        show_progress_bar=True,
    )


def score_on_the_way(recipe: Recipe, tests: Sequence[LocalData], model: Path) -> dict[str, float]:
    """The main scores of the embedder folder `model` on `tests` and the MTEB tasks of `recipe`, by task."""
    found = _evaluated(recipe, tests, recipe.evaluation.tasks, model)
    return {task: of_task.main_score for task, of_task in found.items()}


def main_scores(scores: Scored, system: str, whole: WholeSet | None) -> dict[str, float]:
    """Those of `system` in `scores` by task, without the `whole`, which no model on the way is scored on."""
    found = scores.get(system, {}).items()
    return {task: of_task.main_score for task, of_task in found if whole is None or task != whole.data.name}


def system_of(run: Run, start: Path) -> str:
    """What the scores of `run` call its embedder folder `start`."""
    return "untrained" if start == run.base else start.name


def plain_scores(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    """`scores` by system and task as plain JSON values."""
    return {stage: {task: value.to_dict() for task, value in tasks.items()} for stage, tasks in scores.items()}
