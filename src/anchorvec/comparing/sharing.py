"""What runs of a comparison have in common is made once: a base, a Stage I, and the scores of these."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorvec.files import new_folder, write_json, write_text
from anchorvec.recipe import Recipe, save_recipe
from anchorvec.run import Run, is_embedder
from anchorvec.start import build_base, stored_prompts
from anchorvec.training.budget import Budget


@dataclass(frozen=True)
class Made:
    """A run that was begun: where it lies, its recipe, the budget it has, and the names of what it is scored on."""

    run: Run
    recipe: Recipe
    budget: Budget
    scored_on: tuple[str, ...]

    @property
    def reading(self) -> str:
        """How it reads texts, and what its new weights are drawn from: the same, and so are the untrained scores."""
        recipe = self.recipe
        return json.dumps([recipe.model.model_dump(mode="json"), stored_prompts(recipe), recipe.seed])

    @property
    def start(self) -> str:
        """What its untrained embedder is made of."""
        return f"{self.reading} {self.recipe.stage_one is not None}"

    @property
    def first_stage(self) -> str:
        """What its Stage I is made of, and lasts for; empty without one."""
        if self.recipe.stage_one is None or self.recipe.stage_two is None:
            return ""
        budget = self.budget
        limit = [budget.minutes and budget.minutes * budget.stage_one_share, budget.tokens_of_stage(2, 0)]
        return json.dumps([self.start, self.recipe.stage_one.model_dump(mode="json"), limit, self.scored_on])


def make_base(made: Made, others: Sequence[Made]) -> None:
    """Have the untrained embedder of `made` there: that of one of the `others`, where it is the same, or a new one."""
    run = made.run
    if is_embedder(run.base):
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    donor = _first(others, lambda other: other.start == made.start and is_embedder(other.run.base))
    if donor is not None:
        link_folder(donor.run.base, run.base)
    else:
        build_base(made.recipe, run.base)


def take_over(made: Made, others: Sequence[Made]) -> None:
    """Give `made`, if it is new, what `others` have of it: untrained scores, those of BM25, the same Stage I.

    Its recipe is written last: a run that has one is not new.
    """
    run = made.run
    if run.recipe.is_file():
        return
    same = [other for other in others if other.scored_on == made.scored_on]
    scores: dict[str, Any] = {}
    alike = [other for other in same if other.reading == made.reading]
    for system, others_with_it in (("bm25", same), ("untrained", alike)):
        found = [_scores(other.run)[system] for other in others_with_it if system in _scores(other.run)]
        if found:
            scores[system] = found[0]
    donor = _first(same, lambda other: made.first_stage == other.first_stage and _has_stage_one(other.run))
    if made.first_stage and donor is not None:
        if not is_embedder(run.stage("stage_one")):
            link_folder(donor.run.stage("stage_one"), run.stage("stage_one"))
        _take_over_records(donor.run, run, made.budget)
        of_donor = _scores(donor.run)
        scores |= {"stage_one": of_donor["stage_one"]} if "stage_one" in of_donor else {}
    if scores:
        write_json(run.scores, scores)
    save_recipe(made.recipe, run.recipe)


def _has_stage_one(run: Run) -> bool:
    return is_embedder(run.stage("stage_one")) and "stage_one" in run.noted("seconds")


def _take_over_records(donor: Run, run: Run, budget: Budget) -> None:
    """Write what `donor` has noted of Stage I, and before it, as what `run` has."""
    lines = donor.log.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.strip() and json.loads(line)["stage"] == "stage_one"]
    write_text(run.log, "".join(f"{line}\n" for line in kept))
    write_json(run.rows, {"stage_one": donor.read_rows()["stage_one"]})
    record = {key: value for key, value in donor.read_record().items() if key not in ("export", "best")}
    record["curve"] = [point for point in donor.curve() if point["stage"] == "stage_one"]
    record["seconds"] = {key: value for key, value in record["seconds"].items() if not key.startswith("stage_two")}
    record["engine"] = {"stage_one": record["engine"]["stage_one"]}
    record["budget"] = record["budget"] | {"stage_one_share": budget.stage_one_share}
    write_json(run.record, record)


def link_folder(source: Path, folder: Path) -> None:
    """Make `source` a new `folder` too, whole or not at all: the same files by other names, or copies."""
    with new_folder(folder) as scratch:
        shutil.copytree(source, scratch, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # of a file system without links
        shutil.copy2(source, target)


def _scores(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.scores.read_text(encoding="utf-8")) if run.scores.is_file() else {}
    return found


def _first(made: Sequence[Made], wanted: Callable[[Made], bool]) -> Made | None:
    return next((one for one in made if wanted(one)), None)
