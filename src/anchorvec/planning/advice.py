"""Which setting makes a stage fit: found by trying, with the same estimate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anchorvec.planning.estimate import estimate_stage
from anchorvec.planning.machines import Machine
from anchorvec.planning.setup import Setup
from anchorvec.recipe import Recipe
from anchorvec.recipe.stages import Lora, StageOne
from anchorvec.run import StageName

_LEAST_TOKENS = 64
"""Texts are not advised to be cut shorter."""


@dataclass(frozen=True)
class _Change:
    """A value of the recipe, as one writes it, and the recipe with it."""

    words: str
    section: str
    values: dict[str, Any]

    def applied(self, recipe: Recipe) -> Recipe:
        section = getattr(recipe, self.section)
        return recipe.model_copy(update={self.section: section.model_copy(update=self.values)})


def advice(setup: Setup, recipe: Recipe, name: StageName, machine: Machine | None) -> tuple[str, ...]:
    """Values of `recipe`, as one writes them, with which its stage `name` fits on `machine`, or here; empty: none do.

    The first single one that is enough; else as many as are, one after another. `setup` as in `estimate_stage`.
    """
    changes = list(_changes(recipe, name, 1 if machine is None else machine.devices))
    for change in changes:
        if estimate_stage(setup, change.applied(recipe), name, machine).fits:
            return (change.words,)
    taken: dict[tuple[str, ...], str] = {}
    for change in changes:
        recipe = change.applied(recipe)
        taken[change.section, *change.values] = change.words
        if estimate_stage(setup, recipe, name, machine).fits:
            return tuple(taken.values())
    return ()


def _changes(recipe: Recipe, name: StageName, devices: int) -> Iterator[_Change]:
    """What costs least comes first, on so many `devices`."""
    settings = getattr(recipe, name)
    if settings.micro_batch_tokens is not None:
        yield _Change(f"{name}.micro_batch_tokens=null", name, {"micro_batch_tokens": None})
    if settings.gradient_checkpointing is False:
        yield _Change(f"{name}.gradient_checkpointing=true", name, {"gradient_checkpointing": True})
    if devices > 1 and isinstance(settings, StageOne) and settings.lora is None and not settings.sharded:
        yield _Change(f"{name}.sharded=true", name, {"sharded": True})
    elif settings.lora is None and not (isinstance(settings, StageOne) and settings.sharded):
        yield _Change(f"{name}.lora={{}}", name, {"lora": Lora()})
    tokens = recipe.training_tokens // 2
    while tokens >= _LEAST_TOKENS:
        yield _Change(f"data.max_tokens={tokens}", "data", {"max_tokens": tokens})
        tokens //= 2
