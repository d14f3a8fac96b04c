"""A comparison: learning rates are chosen, every arm is trained with every seed, and the scores are compared."""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from anchorvec.comparing.asked import Arm, Asked, asked_for
from anchorvec.comparing.differences import arm_differences
from anchorvec.comparing.held_out import hold_out
from anchorvec.comparing.record import Record, settings_of
from anchorvec.comparing.result import CompareResult
from anchorvec.comparing.runs import Runs, reason, scores_of
from anchorvec.data import Pairs
from anchorvec.data.stage_inputs import stage_inputs
from anchorvec.device import check_one_device
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, LocalData, check_test_data, require_extra
from anchorvec.interrupts import Interrupts
from anchorvec.pipeline import load_pairs
from anchorvec.run import STAGES, Run
from anchorvec.start import pinned
from anchorvec.terminal import say
from anchorvec.training.trackers import check_trackers

TRIES = "tries"
"""The folder of the runs by which learning rates are chosen."""

_NOTHING_BUT_THE_END = {"data": [], "tasks": [], "bm25": False, "at": [], "every": None, "keep_best": False}
"""What tries are scored on beside the rows that are held out."""


def compare(
    recipe: str | Path,
    arms: Sequence[str | Path],
    *,
    budget: str,
    seeds: int = 3,
    tries: int = 3,
    control: str | None = None,
    at: Sequence[int] = (),
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> CompareResult:
    """Train `arms`, small differences from one `recipe`, with the same budget on the same rows; compare their scores.

    Everything goes into the recipe's `output`: a run for each arm and seed, and `comparison.json`, which
    `anchorvec report` reads.

    - `recipe`: a file or a shipped recipe, which all arms share but for what they change.
    - `arms`: two or more: a shipped one by its short name (`e5`, `echo`, ...), a recipe's file, `key=value`, or the
      recipe itself.
    - `budget`: of each run: `300000tokens` (decoder tokens of all forward passes in training), `125steps` of Stage II,
      or `30minutes` of wall time. Tokens and time are shared by the stages as the recipe's steps would share tokens.
    - `seeds`: how many, from the recipe's own on.
    - `tries`: how many learning rates of the last stage each arm tries, around its own, at a tenth of the budget; the
      best on rows that are held out of all training is taken. 0: the recipe's.
    - `control`: the arm that the others are compared with; by default the first.
    - `at`: steps of Stage II after which every arm is scored, too (`evaluation.at`); 0 is what Stage II starts from.
    - `overrides`: `key=value`, laid over the recipe under every arm.
    - `resume`: go on with the comparison in that folder. What is finished is not done again; what failed is.

    A run that fails is kept with its reason, and the others go on. Raises AnchorvecError for what cannot be compared
    before any work, and if every run failed; Interrupted after Ctrl-C or SIGTERM.
    """
    overrides = [*overrides, *([f"evaluation.at={list(at)}"] if at else [])]
    asked = asked_for(recipe, arms, budget=budget, seeds=seeds, tries=tries, control=control, overrides=overrides)
    require_extra()
    check_one_device()
    check_trackers(asked.recipe.report_to)
    command = _command(asked, overrides)
    record = Record.opened(asked, command, resume=resume)
    asked = _as_begun(asked, record)
    tests = check_test_data(data=asked.recipe.evaluation.data, tasks=asked.recipe.evaluation.tasks)
    pairs, held_out = _rows(asked)
    again = [*command, "--resume"]
    asked.folder.mkdir(parents=True, exist_ok=True)
    with Run(asked.folder).locked(), Interrupts(shlex.join(again)) as interrupts:
        record.write()
        comparison = _Comparison(asked, record, Runs(asked.folder, pairs, again), tests, interrupts)
        comparison.choose_rates(held_out)
        comparison.run_arms()
        comparison.compare()
    return _result(asked, record)


def _command(asked: Asked, overrides: Sequence[str]) -> list[str]:
    """What makes the comparison on the command line."""
    first, *more = [arm.name for arm in asked.arms]
    of_arms = ["--arms", first, *(word for name in more for word in (["--arms", name] if "=" in name else [name]))]
    numbers = ["--seeds", str(len(asked.seeds)), "--tries", str(asked.tries), "--control", asked.control]
    amount = f"{asked.budget.amount:.10g}{asked.budget.kind}"
    return ["anchorvec", "compare", asked.name, *of_arms, "--budget", amount, *numbers, *overrides]


def _as_begun(asked: Asked, record: Record) -> Asked:
    """`asked` with the commits of base and data that it began with, or begins with, in all arms."""
    recipe = record.settings.model_copy(update={"output": asked.folder, "report_to": asked.recipe.report_to})
    if not record.file.is_file():
        recipe = pinned(recipe)
        record.content["settings"] = settings_of(recipe)

    def of_arm(arm: Arm) -> Arm:
        model = arm.recipe.model.model_copy(update={"revision": recipe.model.revision})
        return replace(arm, recipe=arm.recipe.model_copy(update={"model": model, "data": recipe.data}))

    return replace(asked, recipe=recipe, arms=[of_arm(arm) for arm in asked.arms])


def _rows(asked: Asked) -> tuple[Mapping[str, Pairs], Sequence[BeirData]]:
    """The pairs that all arms train on, and the test sets of those that none does, if learning rates are tried.

    Raises AnchorvecError where an arm could not train on them.
    """
    pairs = load_pairs(asked.recipe)
    held_out: Sequence[BeirData] = ()
    if asked.tries:
        pairs, held_out = hold_out(pairs)
        count = sum(len(test.queries) for test in held_out)
        say(f"held out of all training, to choose learning rates by: {count} queries")
    for arm in asked.arms:
        try:
            stage_inputs(arm.recipe, pairs)
        except AnchorvecError as error:
            raise AnchorvecError(f"{arm.name}: {error}") from None
    return pairs, held_out


@dataclass
class _Comparison:
    """The work: `asked`, its `record`, what makes `runs`, and what their models are scored on."""

    asked: Asked
    record: Record
    runs: Runs
    tests: Sequence[LocalData]
    interrupts: Interrupts

    def choose_rates(self, held_out: Sequence[LocalData]) -> None:
        """Try learning rates of each arm; the best one is noted, and the models of the tries are removed."""
        for arm in self.asked.arms if self.asked.tries else ():
            for rate in arm.grid(self.asked.tries):
                self._try(arm, rate, held_out)
            kept = self.record.of(arm)
            scored = [entry for entry in kept["tries"] if entry["score"] is not None]
            if scored:
                # of the same score that which is nearest to the recipe's
                best = max(scored, key=partial(_rank, arm.rate))["learning_rate"]
                kept["learning_rate"] = _rates(arm.with_rate(best))
                edge = best in (min(arm.grid(self.asked.tries)), max(arm.grid(self.asked.tries)))
                at_edge = ", the end of what was tried" if edge else ""
                say(f"{arm.name}: {arm.tuned_stage}.learning_rate is {best:g}{at_edge}")
                self.record.write()
        for folder in (self.asked.folder / TRIES).glob("*/*"):
            for part in ("base", *STAGES, "model"):
                shutil.rmtree(folder / part, ignore_errors=True)

    def _try(self, arm: Arm, rate: float, held_out: Sequence[LocalData]) -> None:
        """Score `arm` with this learning `rate` on the rows that are `held_out`, after a part of the budget."""
        amount = self.asked.budget.part()
        place = f"{TRIES}/{arm.folder}/{rate:g}"
        recipe = amount.applied(arm.with_rate(rate).recipe, is_try=True)
        evaluation = recipe.evaluation.model_copy(update=_NOTHING_BUT_THE_END)
        recipe = recipe.model_copy(update={"seed": self.asked.seeds[0], "evaluation": evaluation})
        kept = self.record.of(arm)
        others = [entry for entry in kept["tries"] if entry["learning_rate"] != rate]
        if any(entry["score"] is not None for entry in kept["tries"] if entry not in others):
            self.runs.remember(place, recipe, amount, held_out)
            return
        say(f"{arm.name}: {arm.tuned_stage}.learning_rate={rate:g}, {amount}")
        entry: dict[str, Any] = {"learning_rate": rate, "score": None}
        try:
            finished = self.runs.run(place, recipe, amount, held_out)
            score = fmean(scores["main_score"] for scores in finished.scores.values())
            entry |= {"score": score, "tokens": sum(finished.tokens.values())}
        except Exception as error:
            entry["failed"] = reason(error)
            say(f"{arm.name}: {rate:g} failed: {entry['failed']}")
        kept["tries"] = sorted([*others, entry], key=lambda one: float(one["learning_rate"]))
        self.record.write()
        self.interrupts.stop()

    def run_arms(self) -> None:
        """Train and score every arm with every seed; one that fails is noted with its reason."""
        for seed in self.asked.seeds:
            for arm in self.asked.arms:
                self._run(arm, seed)
                self.interrupts.stop()
            self._hash_rows(seed)

    def _run(self, arm: Arm, seed: int) -> None:
        kept, place = self.record.of(arm), f"{arm.folder}/{seed}"
        if self.asked.tries and not kept["learning_rate"]:
            why = next(entry["failed"] for entry in kept["tries"])
            self.record.put(arm, {"seed": seed, "folder": place, "failed": f"no learning rate could be tried: {why}"})
            return
        kept["learning_rate"] = kept["learning_rate"] or _rates(arm)
        arm = arm.with_rate(kept["learning_rate"][arm.tuned_stage])
        recipe = self.asked.budget.applied(arm.recipe).model_copy(update={"seed": seed})
        entry = self.record.entry(arm, seed)
        if entry is not None and not entry.get("failed"):
            self.runs.remember(place, recipe, self.asked.budget, self.tests)
            return
        say(f"{arm.name}, seed {seed}: {self.asked.budget}")
        try:
            finished = self.runs.run(place, recipe, self.asked.budget, self.tests)
        except Exception as error:
            why = reason(error)
            say(f"{arm.name}, seed {seed} failed: {why}")
            self.record.put(arm, {"seed": seed, "folder": place, "failed": why})
            return
        found = {key: getattr(finished, key) for key in ("tokens", "steps", "minutes", "scores")}
        self.record.put(arm, {"seed": seed, "folder": place, **found, "curve": finished.run.curve()})

    def _hash_rows(self, seed: int) -> None:
        """Note of each run with this `seed` a hash of the rows of Stage II, up to the last step that all have made."""
        entries = {arm.name: self.record.entry(arm, seed) for arm in self.asked.arms}
        finished = [entry for entry in entries.values() if entry is not None and not entry.get("failed")]
        rows = [Run(self.asked.folder / entry["folder"]).read_rows().get("stage_two", []) for entry in finished]
        common = min(map(len, rows), default=0)
        for entry, hashes in zip(finished, rows, strict=True):
            entry["rows_hash"] = hashes[common - 1] if common else ""
        if len({entry["rows_hash"] for entry in finished}) > 1:
            say(f"seed {seed}: the arms did not see the same rows in the same order in Stage II")
        self.record.write()

    def compare(self) -> None:
        """Note by how much each arm is above the control. Raises AnchorvecError if every run failed."""
        runs = {name: arm["runs"] for name, arm in self.record.content["arms"].items()}
        failures = [entry.get("failed") for of_arm in runs.values() for entry in of_arm]
        if all(failures):
            raise AnchorvecError(f"every run failed, the first one because: {failures[0]}")
        changes = arm_differences(runs, self.asked.control)
        self.record.content["differences"] = [change.model_dump() for change in changes]
        self.record.write()


def _rank(rate: float, entry: Mapping[str, Any]) -> tuple[float, float]:
    """By which the best try is found; `rate` is the recipe's."""
    return entry["score"], -abs(log(entry["learning_rate"] / rate))


def _rates(arm: Arm) -> dict[str, float]:
    """The learning rate of each stage of `arm`."""
    return {name: getattr(arm.recipe, name).learning_rate for name in arm.recipe.stages}


def _result(asked: Asked, record: Record) -> CompareResult:
    """What the comparison has found, with the untrained scores of each different way to read."""
    readings: dict[str, list[Arm]] = {}
    for arm in asked.arms:
        readings.setdefault(json.dumps(arm.recipe.model.model_dump(mode="json")), []).append(arm)
    untrained = {}
    for alike in readings.values():
        finished = [entry["folder"] for arm in alike for entry in record.of(arm)["runs"] if not entry.get("failed")]
        scores = [scores_of(Run(asked.folder / folder), "untrained") for folder in finished]
        if any(scores):
            untrained[", ".join(arm.name for arm in alike)] = next(filter(None, scores))
    return CompareResult(str(asked.folder), record.content, untrained)
