"""What a comparison would take, before anything is trained: steps, tokens, time and disk of each arm."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from anchorvec.commands.plan import Plan, plan
from anchorvec.comparing.asked import TRY_PART, Amount, Arm, asked_for
from anchorvec.terminal import say


@dataclass(frozen=True)
class ArmPlan:
    """What a run of an arm takes: what differs in it, and `steps` and decoder `tokens` of each stage.

    `seconds` are those of training alone, from one micro-step of the longest texts, so rather too many; None: unknown.
    `disk` is in bytes, of what stays when it is finished, and `checkpoints` of what does not.
    """

    differences: dict[str, Any]
    steps: dict[str, int]
    tokens: dict[str, int]
    seconds: float | None
    disk: int
    checkpoints: int


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison takes: `seeds` runs of each arm, and `tries` at a tenth of their `budget`.

    `tokens` and `seconds` (of training; None: unknown) are those of all runs, `disk` the bytes of what they leave, and
    of the largest checkpoints; less where arms share a base or a Stage I.
    """

    recipe: str
    budget: str
    seeds: int
    tries: int
    arms: dict[str, ArmPlan]
    tokens: int
    seconds: float | None
    disk: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __rich__(self) -> Group:
        table = Table(
            title=f"{self.recipe}: {self.budget} an arm", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
        )
        table.add_column("", overflow="fold")
        table.add_column("differs in", overflow="fold")
        for heading in ("steps", "tokens", "minutes", "disk"):
            table.add_column(heading, justify="right")
        for name, arm in self.arms.items():
            changes = ", ".join(f"{key}: {value}" for key, value in arm.differences.items())
            steps, tokens = (" + ".join(f"{n:,}" for n in found.values()) for found in (arm.steps, arm.tokens))
            table.add_row(Text(name), Text(changes), steps, tokens, _minutes(arm.seconds), _gigabytes(arm.disk))
        runs = f"{len(self.arms)} arms, {self.seeds} seeds"
        tries = f", {self.tries} tries at a tenth" if self.tries else ""
        table.add_section()
        table.add_row("all", runs + tries, "", f"{self.tokens:,}", _minutes(self.seconds), _gigabytes(self.disk))
        table.caption = "about; minutes of training alone, without scoring; less where arms share a base or Stage I"
        return Group(table)


def plan_comparison(
    recipe: str | Path,
    arms: Sequence[str | Path],
    *,
    budget: str,
    seeds: int = 3,
    tries: int = 3,
    control: str | None = None,
    overrides: Sequence[str] = (),
    step: bool = True,
) -> ComparisonPlan:
    """What `compare` would do with the same `recipe`, `arms`, `budget`, `seeds`, `tries`, `control` and `overrides`.

    Nothing is trained or kept. With `step` one real micro-step of each stage of each arm is made, which tells the time.
    Raises AnchorvecError for what cannot be compared.
    """
    asked = asked_for(recipe, arms, budget=budget, seeds=seeds, tries=tries, control=control, overrides=overrides)
    found = {}
    for arm in asked.arms:
        say(f"planning {arm.name}")
        found[arm.name] = _of_arm(arm, asked.budget, plan(asked.budget.applied(arm.recipe), step=step))
    runs = len(asked.seeds) + TRY_PART * asked.tries
    seconds = [arm.seconds for arm in found.values()]
    known = [one for one in seconds if one is not None]
    stays = sum(arm.disk for arm in found.values()) * len(asked.seeds)
    return ComparisonPlan(
        recipe=asked.name,
        budget=str(asked.budget),
        seeds=len(asked.seeds),
        tries=asked.tries,
        arms=found,
        tokens=round(runs * sum(sum(arm.tokens.values()) for arm in found.values())),
        seconds=runs * sum(known) if len(known) == len(seconds) else None,
        disk=stays + max(arm.checkpoints for arm in found.values()),
    )


def _of_arm(arm: Arm, budget: Amount, found: Plan) -> ArmPlan:
    """What a run of `arm` takes, from the plan that was `found` for the steps of its recipe."""
    stages = list(found.tokens)
    of_step = {name: found.tokens[name] / getattr(budget.applied(arm.recipe), name).steps for name in stages}
    share = {name: found.tokens[name] / sum(found.tokens.values()) for name in stages}
    speed = {name: _seconds_of_a_token(found, name) for name in stages}
    seconds_of_all = sum(share[name] * (speed[name] or 0.0) for name in stages)
    known = all(speed.values())
    if budget.kind == "minutes":
        all_tokens = 60 * budget.amount / seconds_of_all if known else 0.0
    else:
        all_tokens = budget.amount if budget.kind == "tokens" else float(sum(found.tokens.values()))
    tokens = {name: round(share[name] * all_tokens) for name in stages}
    seconds = sum(tokens[name] * (speed[name] or 0.0) for name in stages) if known else None
    return ArmPlan(
        differences=arm.differences,
        steps={name: round(tokens[name] / of_step[name]) for name in stages} if all_tokens else {},
        tokens=tokens if all_tokens else {},
        seconds=60 * budget.amount if budget.kind == "minutes" else seconds,
        disk=sum(found.disk.values()) - found.disk["checkpoints"],
        checkpoints=found.disk["checkpoints"],
    )


def _seconds_of_a_token(found: Plan, stage: str) -> float | None:
    trial = found.trial_steps[stage]
    return None if trial.seconds is None else trial.seconds / trial.tokens


def _minutes(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 60:,.1f}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
