"""How long a step takes here, from the run's own code on a model of one layer and on one of two.

Their difference is a layer; what is left of the first is the LM head and all that is there once. So a step of L layers
takes t_1 + (L - 1) (t_2 - t_1), and the optimizer by the number of what trains.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anchorvec.data.stage_inputs import LENGTH_SAMPLE, sample_rows
from anchorvec.device import default_device
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.pairs import micro_batches, tokens_at_once
from anchorvec.planning.estimate import StageEstimate
from anchorvec.planning.outline import Outline, save_random
from anchorvec.planning.setup import Setup, on_base
from anchorvec.recipe import Recipe
from anchorvec.run import Run, StageName
from anchorvec.start import build_base
from anchorvec.training.memory import free_memory, release_freed_memory
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import stage_one_objective
from anchorvec.training.stage_two import stage_two_loss, stage_two_model
from anchorvec.training.trial import contrastive_step, refusing

_SHARE_OF_FREE = 0.25
_REPEATS = 3
_TOKENS = 4_096
"""Of a step that is held at once, no more are tried."""


@dataclass(frozen=True)
class Pace:
    """What a stage takes here: seconds for a token, forward and backward, and for an optimizer step, for a parameter.

    Both for the layers that were tried; `seconds_of_step` has that of all.
    """

    one: float
    two: float
    optimizer: float

    def seconds_of_step(self, outline: Outline, tokens: float, trained: float) -> float:
        """Of a step over so many `tokens` that trains so many parameters, `trained`, of `outline`."""
        layer = max(0.0, self.two - self.one)
        return tokens * (self.one + (outline.layers - 1) * layer) + self.optimizer * trained


def too_large(outline: Outline) -> str:
    """Why no probe is made of `outline`; empty where one is: what it takes is at most a quarter of the free memory."""
    two_layers = Outline(outline.cut(min(2, outline.layers))).parameters
    needed, free = 5 * 4 * two_layers, free_memory(default_device())  # weights twice, gradients, two moments
    if needed <= _SHARE_OF_FREE * free:
        return ""
    return (
        f"time is not measured: the layers and the head would take {needed / 1e9:.1f} GB, more than a quarter of the "
        f"{free / 1e9:.1f} GB that are free; name a machine (--machine)"
    )


def save_layers(setup: Setup, folder: Path) -> list[Run]:
    """Runs in `folder` whose bases are a model of one layer and one of two, in the shape of `setup`."""
    runs = []
    for layers in sorted({1, min(2, setup.outline.layers)}):
        base = save_random(setup.outline.cut(layers), setup.base_tokenizer, folder / f"{layers}", setup.recipe.seed)
        run = Run(folder / f"run_{layers}")
        build_base(on_base(setup.recipe, base), run.base)
        runs.append(run)
    return runs


def measure(setup: Setup, name: StageName, found: StageEstimate, runs: Sequence[Run]) -> Pace:
    """The pace of the stage `name`, held as its estimate `found` says, on the models of `runs`, of `setup`."""
    recipe = setup.recipe
    settings = getattr(recipe, name)
    asked: dict[str, Any] = {"gradient_checkpointing": found.engine.gradient_checkpointing}
    if name == "stage_one" or found.engine.cached_gradients:
        asked["micro_batch_tokens"] = found.engine.micro_batch_tokens
    recipe = recipe.model_copy(update={name: settings.model_copy(update=asked)})
    each = []
    for run in runs:
        with refusing(name):
            each.append(_pace(setup, recipe, name, run))
        release_freed_memory()
    return Pace(each[0][0], each[-1][0], each[-1][1])


def _pace(setup: Setup, recipe: Recipe, name: StageName, run: Run) -> tuple[float, float]:
    """Seconds for a token, and of the optimizer for a parameter that trains."""
    stage = Stage(name, recipe, run, run.base, setup.inputs)
    step, module, tokens = (_stage_one if name == "stage_one" else _stage_two)(setup, recipe, stage)
    working = WorkingWeights(module) if stage.bf16 else None
    trained = [p for p in module.parameters() if p.requires_grad]

    def backward() -> None:
        # the backward pass too: cached gradients encode in it
        with torch.autocast(default_device().type, torch.bfloat16, enabled=stage.bf16):
            step().backward()

    with working.in_use() if working else nullcontext():
        seconds = _seconds(backward) / tokens
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    of_optimizer = _seconds(update) / sum(p.numel() for p in trained)
    return seconds, of_optimizer


def _stage_one(setup: Setup, recipe: Recipe, stage: Stage) -> tuple[Callable[[], Any], nn.Module, int]:
    """The loss of a micro-batch of middling texts, the module that trains, and the tokens of the micro-batch."""
    tokenize = setup.tokenize(recipe)
    objective, engine = stage_one_objective(stage, tokenize)
    pairs = tokenize(sample_rows(setup.inputs.reconstruction, LENGTH_SAMPLE, recipe.seed))["pairs"]
    drawn = objective.draw(pairs[: stage.one.pairs_per_step], 0)
    budget = min(engine.micro_batch_tokens, _TOKENS)
    groups = micro_batches(drawn, budget, **objective.cut)
    group = groups[len(groups) // 2]
    return lambda: objective(group).loss, objective, tokens_at_once(group, **objective.cut | {"packed": True})


def _stage_two(setup: Setup, recipe: Recipe, stage: Stage) -> tuple[Callable[[], Any], nn.Module, int]:
    """The same of a part of a step of the first data set."""
    two = stage_two_model(stage)
    dataset_name, dataset = next(iter(setup.inputs.contrastive.items()))
    rows = sample_rows(dataset, stage.two.pairs_per_step, recipe.seed)
    loss = stage_two_loss(stage, two)
    step, tokens = contrastive_step(two.model, loss, setup.inputs.prompts[dataset_name])
    while len(rows) > 2 and tokens(rows) > _TOKENS:
        rows = rows[: max(2, len(rows) // 2)]
    return lambda: step(rows), loss, tokens(rows)


def _seconds(work: Callable[[], None]) -> float:
    """Of the middle one of some calls, after one that pays for memory and caches."""
    taken = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
