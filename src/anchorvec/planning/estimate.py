"""What each stage of a recipe takes on a machine: memory, arithmetic, disk and time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from anchorvec.device import default_device, resolve_precision
from anchorvec.objectives.bag_of_words import SAMPLE_PAIRS
from anchorvec.planning.activations import kept_for_a_token
from anchorvec.planning.arithmetic import Layers, Scaled, forward_flops, step_flops
from anchorvec.planning.machines import Machine, share_of_peak
from anchorvec.planning.memory import Memory, Weights, memory_of_stage, memory_of_weights
from anchorvec.planning.outline import Outline
from anchorvec.planning.setup import Setup
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.run import StageName
from anchorvec.training.checkpoints import CHECKPOINT_BYTES, WEIGHT_BYTES, most_at_once
from anchorvec.training.engine import Engine, decide_engine
from anchorvec.training.memory import free_memory

_CONTEXT = 1e9
"""Bytes of a GPU that its driver, libraries and kernels take."""

_OPTIMIZER_TRAFFIC, _CAST_TRAFFIC = 32, 6
"""Bytes that AdamW, the norm of the gradients and their zeroing move for a parameter, and making its bf16 copy."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage takes on one of the devices: `memory` in bytes, of which `capacity` are there.

    `tokens` and `flops` are those of the whole stage over all devices. `seconds`: of an optimizer step, and of all;
    None: not known. `share`: of the peak that it is reckoned with, on a named machine. `advice`: values of the recipe
    with which it fits.
    """

    engine: Engine
    memory: Memory
    capacity: float
    fits: bool
    trained: int
    tokens: int
    flops: float
    seconds_per_step: float | None = None
    seconds: float | None = None
    share: float | None = None
    advice: tuple[str, ...] = ()


def estimate_stage(setup: Setup, recipe: Recipe, name: StageName, machine: Machine | None) -> StageEstimate:
    """What the stage `name` of `recipe` takes on `machine`, or on this one, which has no seconds yet.

    `setup` is that of a recipe of the same model, data and objectives.
    """
    settings: StageOne | StageTwo = getattr(recipe, name)
    device = default_device() if machine is None else torch.device("cuda")
    recipe = with_precision(recipe, machine)
    bf16 = resolve_precision(recipe.model.precision) == "bf16"
    devices = 1 if machine is None else machine.devices
    on_one = recipe.model_copy(
        update={name: settings.model_copy(update={"pairs_per_step": -(-settings.pairs_per_step // devices)})}
    )
    demand = setup.demand(name, on_one, device)
    weights = weights_of(setup.outline, recipe, name, bf16=bf16)
    fixed = memory_of_weights(weights, bf16=bf16)
    if devices > 1:  # gradients are copied to be exchanged
        fixed = replace(fixed, gradients=fixed.gradients + 4 * weights.trained)
    held_by_weights = fixed.weights + fixed.master_weights
    own = (
        Memory()
        if machine is not None
        else memory_of_stage(Memory(), _NOTHING, held=0, score_bytes=0, embeddings=0, cpu=device.type == "cpu")
    )
    capacity = free_memory(device) + own.peak if machine is None else machine.memory - _CONTEXT
    lora = None if settings.lora is None else (settings.lora.r, settings.lora.dropout)

    def kept(checkpointing: bool) -> tuple[float, float]:
        attention: Any = "eager" if recipe.model.attention == "eager" else "sdpa"
        options: dict[str, Any] = {"bf16": bf16, "longest": demand.longest, "attention": attention, "lora": lora}
        return kept_for_a_token(setup.outline, checkpointing=checkpointing, **options), 0.0

    engine = decide_engine(kept, demand, weights.trained, device, max(0.0, capacity - own.peak - held_by_weights))
    passes = setup.passes(name, recipe)
    of_device = passes.tokens / devices
    at_once = name == "stage_two" and not engine.cached_gradients
    memory = memory_of_stage(
        fixed,
        engine,
        held=(demand.step_tokens or of_device)
        if at_once
        else min(max(engine.micro_batch_tokens, demand.least_tokens), of_device),
        score_bytes=demand.logits_bytes,
        embeddings=2 * settings.pairs_per_step / devices * setup.outline.hidden,
        cpu=device.type == "cpu",
    )
    found = StageEstimate(
        engine=engine,
        memory=memory,
        capacity=capacity,
        fits=engine.fits and memory.peak <= capacity,
        trained=round(weights.trained),
        tokens=round(passes.tokens * settings.steps),
        flops=settings.steps * flops_of_step(setup.outline, settings, engine, passes),
    )
    return found if machine is None else _timed_on(found, machine, setup.outline, name, settings, weights, bf16)


_NOTHING = Engine(packed=True, gradient_checkpointing=False, micro_batch_tokens=1, bytes_per_token=0, fits=True)


def with_precision(recipe: Recipe, machine: Machine | None) -> Recipe:
    """`recipe` with the number format that `auto` is on the GPU `machine`: bf16. Here it is measured."""
    if machine is None or recipe.model.precision != "auto":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": "bf16"})})


def weights_of(outline: Outline, recipe: Recipe, name: StageName, *, bf16: bool) -> Weights:
    """The parameters that the stage `name` of `recipe` holds of `outline`, by what becomes of them, in `bf16` or no."""
    settings: StageOne | StageTwo = getattr(recipe, name)
    head = outline.head if name == "stage_one" else 0  # a tied one is copied for the head too
    linear = outline.linear_parameters + head
    whole = outline.parameters if name == "stage_one" else outline.body_parameters
    own_head = head if head and not outline.tied else 0
    told = isinstance(settings, StageOne) and settings.target == "bag_of_words" and settings.candidates == "texts"
    told = told or (isinstance(settings, StageTwo) and settings.bag_of_words_weight > 0)
    table = outline.head
    bags = (table * (settings.lora is None) + 2 * SAMPLE_PAIRS * outline.hidden + outline.hidden**2) if told else 0
    if settings.lora is None:
        idle = own_head if told else 0
        return Weights(
            trained=whole - idle,
            trained_linear=linear - idle,
            table=table,
            frozen_copied=idle,
            frozen_other=bags,
        )
    adapters = outline.adapters(settings.lora.r)
    in_bf16 = outline.linear_parameters if name == "stage_two" and bf16 else 0
    copied = head + outline.linear_parameters - in_bf16
    return Weights(
        trained=adapters,
        trained_linear=adapters,
        frozen_linear=in_bf16,
        frozen_copied=copied,
        frozen_other=whole - copied - in_bf16 + bags,
    )


def flops_of_step(outline: Outline, settings: StageOne | StageTwo, engine: Engine, passes: Scaled) -> float:
    """FLOPs of an optimizer step with `settings` on `outline`, as the `engine` makes it, over `passes`.

    In one of `log_every` steps of Stage I embeddings are exchanged: its forward pass is made twice.
    """
    lora = settings.lora
    layers = Layers(
        linear=outline.linear,
        attention=outline.attention_width * outline.layers,
        head=outline.head,
        adapters=0 if lora is None else outline.adapters(lora.r),
        frozen=lora is not None,
    )
    again = engine.gradient_checkpointing + engine.cached_gradients
    exchanged = 0.0
    if isinstance(settings, StageOne) and settings.target != "masked":
        exchanged = (forward_flops(layers, passes) + 2 * layers.head * passes.targets) / settings.log_every
    return step_flops(layers, passes, again=again, chunked=passes.targets > 0) + exchanged


def _timed_on(
    found: StageEstimate,
    machine: Machine,
    outline: Outline,
    name: StageName,
    settings: StageOne | StageTwo,
    weights: Weights,
    bf16: bool,
) -> StageEstimate:
    """`found` with its time on `machine`: arithmetic at the measured share of the peak, then the optimizer.

    Gradients are exchanged meanwhile, so that the longer of the two counts.
    """
    share = share_of_peak(name, outline.hidden, lora=settings.lora is not None, compiled=found.engine.compiled)
    peak = (machine.bf16_tflops if bf16 else machine.fp32_tflops) * 1e12
    computing = found.flops / settings.steps / machine.devices / (share * peak)
    exchanging = 8 * weights.trained * (1 - 1 / machine.devices) / (machine.link_gbs * 1e9)
    moved = _OPTIMIZER_TRAFFIC * weights.trained + (_CAST_TRAFFIC * weights.trained_linear if bf16 else 0)
    step = max(computing, exchanging) + moved / (machine.bandwidth_gbs * 1e9)
    return replace(found, seconds_per_step=step, seconds=step * settings.steps, share=share)


def disk_of(
    recipe: Recipe, stages: Mapping[str, StageEstimate], parameters: int, body: int, base_bytes: int
) -> dict[str, int]:
    """Bytes, in fp32, of what each of the `stages` of `recipe` writes, of the most checkpoints at one time, and others.

    `parameters` are those of the model, of which its decoder has `body`; the base takes `base_bytes`. The others are
    base and export.
    """
    disk = {"base": base_bytes}
    disk["checkpoints"] = max(
        most_at_once(getattr(recipe, name)) * CHECKPOINT_BYTES * found.trained for name, found in stages.items()
    )
    if "stage_one" in stages:
        disk["stage_one"] = WEIGHT_BYTES * parameters
    if "stage_two" in stages:
        disk["stage_two"] = WEIGHT_BYTES * stages["stage_two"].trained
    disk["export"] = WEIGHT_BYTES * (body if "stage_two" in stages else parameters)
    return disk
