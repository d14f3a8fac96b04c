"""A whole run: its stages, its scores and its export."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from anchorvec.device import device_name
from anchorvec.evaluation import check_test_data
from anchorvec.planning.advice import advice
from anchorvec.planning.arithmetic import Layers, Passes, forward_flops
from anchorvec.planning.estimate import StageEstimate, disk_of, estimate_stage
from anchorvec.planning.machines import Machine, share_of_peak
from anchorvec.planning.probe import measure, save_layers, too_large
from anchorvec.planning.setup import Setup
from anchorvec.planning.shown import show
from anchorvec.recipe import Recipe

_DISK_SPEED = 0.5e9
"""Bytes a second that are read or written, and hashed; an assumption."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes on the `machine`: each of its `stages`, `disk` in bytes and `seconds` by part.

    `seconds` lacks what is not known; `notes` say why. `parameters` are those of the model, of which its decoder has
    `body_parameters`.
    """

    machine: str
    stages: dict[str, StageEstimate]
    disk: dict[str, int]
    seconds: dict[str, float]
    parameters: int
    body_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Of all parts that are known."""
        return sum(self.seconds.values())

    def __rich__(self) -> Group:
        return show(self)


def estimate_run(setup: Setup, machine: Machine | None, folder: Path) -> RunEstimate:
    """What the recipe of `setup` takes on `machine`; None: on this one, where layers are tried out in `folder`."""
    recipe, outline = setup.recipe, setup.outline
    notes = []
    stages: dict[str, StageEstimate] = {name: estimate_stage(setup, recipe, name, machine) for name in recipe.stages}
    if machine is None:
        if (reason := too_large(outline)) or not all(stage.fits for stage in stages.values()):
            notes.append(reason or "time is not measured: a stage does not fit into the memory that is free")
        else:
            runs = save_layers(setup, folder)
            for name in recipe.stages:
                pace = measure(setup, name, stages[name], runs)
                settings = getattr(recipe, name)
                step = pace.seconds_of_step(outline, stages[name].tokens / settings.steps, stages[name].trained)
                stages[name] = replace(stages[name], seconds_per_step=step, seconds=step * settings.steps)
    else:
        notes += _of_machine(recipe, machine)
    for name in recipe.stages:
        if not stages[name].fits:
            stages[name] = replace(stages[name], advice=advice(setup, recipe, name, machine))
    base_bytes = outline.parameters * torch.finfo(getattr(outline.config, "dtype", None) or torch.float32).bits // 8
    disk = disk_of(recipe, stages, outline.parameters, outline.body_parameters, base_bytes)
    seconds = {"base": 2 * disk["base"] / _DISK_SPEED}
    seconds |= {name: stage.seconds for name, stage in stages.items() if stage.seconds is not None}
    if recipe.evaluation.tasks:
        notes.append(f"the time of MTEB tasks is not in it: {', '.join(recipe.evaluation.tasks)}")
    if recipe.evaluation.data:
        flops = scoring_flops(setup)
        if rate := _flops_per_second(stages, machine, recipe, outline.hidden):
            seconds["scoring"] = (1 + len(stages)) * flops / rate
    seconds["export"] = 3 * disk["export"] / _DISK_SPEED
    return RunEstimate(
        machine=device_name() if machine is None else str(machine),
        stages=stages,
        disk=disk,
        seconds=seconds,
        parameters=outline.parameters,
        body_parameters=outline.body_parameters,
        notes=tuple(notes),
    )


def _of_machine(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """What is to be said of a plan of `recipe` for `machine`."""
    yield (
        f"an estimate: peaks of {machine.name} ({machine.source}), of which that share is reckoned with that was "
        "measured on an H100"
    )
    if machine.devices == 1:
        return
    one = recipe.stage_one
    if one is not None and one.sharded:
        yield "in stage_one each device holds a part of weights, gradients and moments; in stage_two all weights"
    else:
        yield "each device holds all weights; stage_one.sharded=true shares those of Stage I out"
    if one is not None and one.pairs_per_step % machine.devices:
        few, rest = divmod(one.pairs_per_step, machine.devices)
        yield (
            f"stage_one.pairs_per_step: {rest} of {machine.devices} devices have {few + 1} of its {one.pairs_per_step} "
            f"pairs and the others {few}, which wait for them"
        )


def scoring_flops(setup: Setup) -> float:
    """FLOPs of encoding the local test data of the recipe of `setup` once."""
    recipe, outline = setup.recipe, setup.outline
    tokens_per_character = setup.tokens_per_character()
    lengths = [
        min(float(recipe.model.max_tokens), 2 + tokens_per_character * length)
        for data in check_test_data(data=recipe.evaluation.data)
        for length in _lengths(data)
    ]
    layers = Layers(linear=outline.linear, attention=outline.attention_width * outline.layers)
    return forward_flops(layers, Passes(lengths).times(2.0 if recipe.model.read == "twice" else 1.0))


def _lengths(data: Any) -> Iterator[int]:
    """The characters of each text in test data of any kind."""
    if isinstance(data, str):
        yield len(data)
    elif is_dataclass(data):
        for field in fields(data):
            if field.name != "name":
                yield from _lengths(getattr(data, field.name))
    elif isinstance(data, Mapping | list | tuple):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from _lengths(part)


def _flops_per_second(
    stages: Mapping[str, StageEstimate], machine: Machine | None, recipe: Recipe, hidden: int
) -> float | None:
    """With which texts are encoded: on one device of `machine`, or as a stage computes here; None: not known."""
    if machine is not None:
        peak = machine.fp32_tflops if recipe.evaluation.precision == "fp32" else machine.bf16_tflops
        return share_of_peak("stage_two", hidden, lora=False, compiled=True) * peak * 1e12
    timed = [stage for stage in stages.values() if stage.seconds]
    return timed[-1].flops / timed[-1].seconds if timed and timed[-1].seconds else None
