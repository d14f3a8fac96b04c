"""How a run is opened that may have been interrupted: whose it is, and what is left of it.

Everything that a run writes is there whole or not at all, so what is there is finished, and the rest is done. Only the
stage that was under way goes on from a checkpoint.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.recipe import Recipe, load_recipe
from anchorvec.run import STAGES, Run, is_embedder
from anchorvec.start import is_commit, pinned
from anchorvec.terminal import say
from anchorvec.training.budget import Budget
from anchorvec.training.checkpointed import STATE

_FREE = ("output", "report_to")
_FREE_OF_STAGES = ("save_steps", "save_total_limit")
"""Keys that change nothing in the result, so that a run may go on with other values."""


def opened(recipe: Recipe, budget: Budget | None, *, resume: bool) -> tuple[Run, Recipe, Budget]:
    """The run in the folder of `recipe`, with the recipe and the budget that it goes on with.

    Without `resume`, or where nothing was begun there, it is a new one. Raises AnchorvecError if the folder holds a run
    of another recipe or another time.
    """
    run = (Run.resume if resume else Run.create)(recipe.output)
    if resume and not run.recipe.is_file():
        say(f"output: there is no run in {run.folder} yet; it begins")
    return run, *as_begun(run, recipe, budget)


def as_begun(run: Run, recipe: Recipe, budget: Budget | None) -> tuple[Recipe, Budget]:
    """The recipe and the budget that `run` goes on with, or begins with; `recipe` and `budget` are what is asked for.

    Raises AnchorvecError where it was begun with others.
    """
    if not run.recipe.is_file():
        return pinned(recipe), budget or Budget()
    return _recipe_of(run, recipe), _budget_of(run, budget)


def check_same_data(run: Run, record: Mapping[str, Any]) -> None:
    """Raise AnchorvecError unless the pairs in the `record` are those that `run` began with; say what else differs."""
    before = run.read_record()
    for name, data in record["data"].items():
        if data["fingerprint"] != before["data"][name]["fingerprint"]:
            raise AnchorvecError(
                f"data.train: {data['path']} has other pairs than when {run.folder} began; put them back"
            )
    machine = {**record["versions"], "device": record["device"], "threads": record["threads"]}
    machine_before = {**before["versions"], "device": before["device"], "threads": before["threads"]}
    changed = [
        f"{key} {machine_before.get(key)}, now {value}"
        for key, value in machine.items()
        if value != machine_before.get(key)
    ]
    if changed:
        say(f"this run began elsewhere, and does not go on bit for bit: {'; '.join(changed)}")


def _recipe_of(run: Run, asked: Recipe) -> Recipe:
    """The recipe of `run`, with what may differ as in `asked`; AnchorvecError where something else does."""
    stored = load_recipe(run.recipe)
    noted = run.noted("budget")
    timed = noted.get("minutes") is not None or noted.get("tokens") is not None
    made = [name for name in STAGES if timed and is_embedder(run.stage(name))]  # their steps were saved as they came
    free = {*_FREE, *(f"{name}.{key}" for name in STAGES for key in _FREE_OF_STAGES)}
    free |= {f"{name}.{key}" for name in made for key in ("steps", "warmup_steps")}
    before, now = (dict(_values(recipe.model_dump(mode="json"))) for recipe in (stored, asked))
    free |= {key for key, value in now.items() if key.endswith(".revision") and not is_commit(value)}  # pinned since
    different = [key for key in before | now if key not in free and before.get(key) != now.get(key)]
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise AnchorvecError(
            f"output: {run.folder} holds the run of another recipe: {key} is {before.get(key)} there, and "
            f"{now.get(key)} here{more}; go on with its own, {run.recipe}, or name a new folder"
        )
    stages = {}
    for name in stored.stages:
        settings = getattr(asked, name)
        stages[name] = getattr(stored, name).model_copy(update={key: getattr(settings, key) for key in _FREE_OF_STAGES})
    return stored.model_copy(update={key: getattr(asked, key) for key in _FREE} | stages)


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a recipe with its dotted key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield key, value
        return
    for name, part in inner:
        yield from _values(part, f"{key}.{name}".lstrip("."))


def _budget_of(run: Run, asked: Budget | None) -> Budget:
    """The budget that `run` began with; AnchorvecError where `asked` is another one."""
    noted = run.noted("budget")
    minutes, tokens = noted.get("minutes"), noted.get("tokens")
    if noted and asked is not None and asked.is_limited and (asked.minutes, asked.tokens) != (minutes, tokens):
        key = "minutes" if asked.minutes is not None else "tokens"
        has, wanted = _words(minutes, tokens), _words(asked.minutes, asked.tokens)
        raise AnchorvecError(f"{key}: {run.folder} was begun with {has}, not with {wanted}")
    return Budget(minutes, stage_one_share=noted["stage_one_share"], tokens=tokens) if noted else asked or Budget()


def _words(minutes: float | None, tokens: int | None) -> str:
    """What a budget is, in words."""
    if minutes is not None:
        return f"{minutes:g} minutes"
    return "the steps of its recipe" if tokens is None else f"{tokens:,} tokens"


def time_left(run: Run, budget: Budget, checkpoint: Path | None) -> Budget:
    """`budget` with its beginning moved, so that the time does not count since what `run` has kept last.

    That is the `checkpoint` of the stage under way, or else what the record names.
    """
    if checkpoint is not None:
        spent = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["spent"]
    else:
        spent = max(run.noted("seconds").values())
    return replace(budget, began=time.monotonic() - spent)
