"""What a comparison was asked for: its arms, their budget, seeds and tries; checked before any work."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from anchorvec.errors import AnchorvecError
from anchorvec.pipeline import with_steps
from anchorvec.recipe import Recipe, load_arm, load_recipe, recipe_names
from anchorvec.run import StageName
from anchorvec.start import with_settings_of_base
from anchorvec.training.budget import Budget

Unit = Literal["tokens", "steps", "minutes"]

SHIPPED_ARMS = "arms/"
TRY_PART = 0.1
"""Of the budget, for a try of a learning rate."""

_STEP_BETWEEN_TRIES = 3.0
_MODEL_SHARED = ("base", "revision")


@dataclass(frozen=True)
class Amount:
    """What every arm may use: decoder tokens, steps of Stage II, or minutes of wall time, scoring and export included.

    Of a budget in steps Stage I makes those of its recipe.
    """

    kind: Unit
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """What `text` says: a number and its unit, such as `300000tokens`, `125 steps` or `30minutes`.

        Raises AnchorvecError for anything else.
        """
        found = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text)
        units = get_args(Unit)
        if found is None or found[2] not in units:
            what = "has no unit" if found is not None and not found[2] else f"is none of {', '.join(units)}"
            raise AnchorvecError(f"budget: {text!r} {what}; write, for example, 300000tokens, 125steps or 30minutes")
        amount = float(re.sub("[_,]", "", found[1]))
        if amount <= 0 or (found[2] != "minutes" and amount != int(amount)):
            raise AnchorvecError(f"budget: {text!r} is no whole number above 0; write, for example, 300000tokens")
        return cls(found[2], amount)  # type: ignore[arg-type]  # it is one of the units

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.kind}"

    def part(self) -> "Amount":
        """That of a try of a learning rate; a step at least."""
        amount = TRY_PART * self.amount
        return replace(self, amount=amount if self.kind == "minutes" else max(1, round(amount)))

    def budget(self, stage_one_share: float) -> Budget:
        """The same for a run, with so large a `stage_one_share`; of steps it is the recipe that says them."""
        if self.kind == "tokens":
            return Budget(tokens=int(self.amount), stage_one_share=stage_one_share)
        return Budget(self.amount if self.kind == "minutes" else None, stage_one_share=stage_one_share)

    def applied(self, recipe: Recipe, *, is_try: bool = False) -> Recipe:
        """`recipe` with so many steps of Stage II, if these are counted; Stage I of what `is_try` makes its part."""
        if self.kind != "steps":
            return recipe
        changed = with_steps(recipe, "stage_two", int(self.amount))
        if is_try and changed.stage_one is not None:
            changed = with_steps(changed, "stage_one", max(1, round(TRY_PART * changed.stage_one.steps)))
        return changed


@dataclass(frozen=True)
class Arm:
    """One arm: what it is called, its whole recipe, and what differs in it, dotted key -> value."""

    name: str
    recipe: Recipe
    differences: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.") or "arm"

    @property
    def tuned_stage(self) -> StageName:
        """The stage whose learning rate is tried: the last one."""
        return self.recipe.stages[-1]

    def with_rate(self, rate: float) -> "Arm":
        """The same arm with another learning `rate` in that stage."""
        settings = getattr(self.recipe, self.tuned_stage).model_copy(update={"learning_rate": rate})
        return replace(self, recipe=self.recipe.model_copy(update={self.tuned_stage: settings}))

    @property
    def rate(self) -> float:
        """The learning rate of that stage."""
        found: float = getattr(self.recipe, self.tuned_stage).learning_rate
        return found

    def grid(self, tries: int) -> list[float]:
        """As many learning rates as `tries`, each three times the one before, the middle one its own."""
        powers = range(-(tries // 2), tries - tries // 2)
        return [float(f"{self.rate * _STEP_BETWEEN_TRIES**power:.3g}") for power in powers]


@dataclass(frozen=True)
class Asked:
    """A comparison: the `arms` of `recipe`, each with the `budget` and with every one of `seeds`.

    `name` is the recipe's, `tries` how many learning rates an arm tries, `control` what the others are compared with,
    `folder` where all of it goes.
    """

    name: str
    recipe: Recipe
    arms: Sequence[Arm]
    budget: Amount
    seeds: Sequence[int]
    tries: int
    control: str
    folder: Path


def asked_for(
    recipe: str | Path,
    arms: Sequence[str | Path],
    *,
    budget: str,
    seeds: int,
    tries: int,
    control: str | None,
    overrides: Sequence[str],
) -> Asked:
    """What `compare` was asked for; `recipe`, `arms`, `budget`, `seeds`, `tries`, `control`, `overrides` are its own.

    Raises AnchorvecError for what is none: an unknown arm, fewer than two of them, one named twice, a budget without a
    unit, no seed, arms with different base models, nothing to score on, no folder.
    """
    amount = Amount.parse(budget)
    names = [str(arm) for arm in arms]
    _check_numbers(names, seeds, tries)
    control = names[0] if control is None else control
    if control not in names:
        raise AnchorvecError(f"control: {control} is none of the arms; they are {', '.join(names)}")
    base = with_settings_of_base(load_recipe(recipe, overrides))
    if base.output is None:
        raise AnchorvecError("output: the recipe names no folder for the comparison; add output=FOLDER")
    if not base.evaluation.data and not base.evaluation.tasks:
        raise AnchorvecError(
            "evaluation: there is nothing to score the arms on; name test sets, such as evaluation.data=[beir/scifact]"
        )
    found = [_arm(recipe, arm, base, overrides) for arm in names]
    if (folders := [arm.folder for arm in found]) and len(set(folders)) < len(folders):
        raise AnchorvecError(f"two arms would have the same folder ({', '.join(folders)}); rename one")
    if amount.kind == "steps" and (without := [arm.name for arm in found if arm.recipe.stage_two is None]):
        raise AnchorvecError(f"budget: {without[0]} has no Stage II, whose steps are counted; give tokens or minutes")
    return Asked(
        name=str(recipe),
        recipe=base,
        arms=found,
        budget=amount,
        seeds=range(base.seed, base.seed + seeds),
        tries=tries,
        control=control,
        folder=base.output,
    )


def _check_numbers(names: Sequence[str], seeds: int, tries: int) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AnchorvecError(f"arms: {twice} is named twice; name it once")
    if len(names) < 2:
        raise AnchorvecError(f"arms: {len(names)} of them; a comparison needs two or more, such as e5 and anchor")
    if seeds < 1:
        raise AnchorvecError(f"seeds: {seeds} of them; give 1 or more, 3 for a difference that holds for others")
    if tries != 0 and tries < 2:
        raise AnchorvecError(f"tries: {tries} learning rates leave nothing to choose; give 0, or 2 or more")


def _arm(recipe: str | Path, name: str, base: Recipe, overrides: Sequence[str]) -> Arm:
    """The arm `name` of the `recipe`, which is `base` when the `overrides` are laid over it."""
    found = with_settings_of_base(load_arm(recipe, _source(name, str(recipe)), overrides))
    for key in _MODEL_SHARED:
        if getattr(found.model, key) != getattr(base.model, key):
            raise AnchorvecError(f"{name}: model.{key}: all arms of a comparison share it; change the recipe instead")
    changes = differences(base.model_dump(mode="json"), found.model_dump(mode="json"))
    changes.pop("about", None)
    return Arm(name, found, changes)


def _source(name: str, recipe: str) -> str:
    """What `load_arm` takes for the arm `name`: a shipped one has its short name too."""
    shipped = recipe_names()
    short = [known.removeprefix(SHIPPED_ARMS) for known in shipped if known.startswith(SHIPPED_ARMS)]
    if name in short:
        return SHIPPED_ARMS + name
    if name in shipped or name == recipe or "=" in name or Path(name).is_file():
        return name
    near = difflib.get_close_matches(name, short, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise AnchorvecError(
        f"arms: there is no arm {name}; {hint}the shipped ones are {', '.join(short)}; others are a recipe's file, the "
        f"recipe {recipe} itself, or key=value"
    )


def differences(before: Any, now: Any, key: str = "") -> dict[str, Any]:
    """What differs in `now` from `before`, the values of recipes: dotted key -> value; `key` is that of both.

    A section that one of them lacks differs as a whole.
    """
    if not isinstance(before, dict) or not isinstance(now, dict):
        return {} if before == now else {key: now}
    found: dict[str, Any] = {}
    for name in now:
        found |= differences(before.get(name), now[name], f"{key}.{name}".lstrip("."))
    return found
