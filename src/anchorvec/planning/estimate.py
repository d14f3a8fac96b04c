"""What each stage of a recipe takes on a machine: memory, arithmetic, disk and time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from anchorvec.device import default_device, resolve_precision
from anchorvec.objectives.bag_of_words import SAMPLE_PAIRS
from anchorvec.planning.activations import Attention, kept_for_a_token
from anchorvec.planning.arithmetic import Layers, Scaled, forward_flops, step_flops
from anchorvec.planning.machines import Machine, share_of_peak
from anchorvec.planning.memory import Memory, Weights, memory_of_stage, memory_of_weights, shared_out
from anchorvec.planning.network import exchanged_bytes, waiting_seconds
from anchorvec.planning.outline import Outline
from anchorvec.planning.setup import Setup
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.run import StageName
from anchorvec.training.checkpoints import CHECKPOINT_BYTES, WEIGHT_BYTES, most_at_once
from anchorvec.training.engine import Demand, Engine, decide_engine
from anchorvec.training.memory import free_memory

_CONTEXT = 1e9
"""Bytes of a GPU that its driver, libraries and kernels take."""

_OPTIMIZER_TRAFFIC, _CAST_TRAFFIC = 32, 6
"""Bytes that AdamW, the norm of the gradients and their zeroing move for a parameter, and making its bf16 copy."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage takes on one of the devices: `memory` in bytes, of which `capacity` are there.

    `tokens` and `flops` are those of the whole stage over all devices. `seconds`: of an optimizer step, and of all;
    None: not known. `share`: of the peak that it is reckoned with, on a named machine. `exchanged`: bytes that a device
    sends in a step. `whole_model`: bytes of the model that each device holds when a stage starts whose weights are
    shared out. `advice`: values of the recipe with which it fits.
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
    exchanged: float = 0.0
    whole_model: float = 0.0
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
    sharded = devices > 1 and isinstance(settings, StageOne) and settings.sharded
    largest_share = -(-settings.pairs_per_step // devices)
    on_one = recipe.model_copy(update={name: settings.model_copy(update={"pairs_per_step": largest_share})})
    demand = replace(setup.demand(name, on_one, device), devices=devices, shards=devices if sharded else 1)
    weights = weights_of(setup.outline, recipe, name, bf16=bf16)
    fixed = _fixed(weights, setup.outline, devices, sharded=sharded, bf16=bf16)
    whole_model = 4 * weights.whole if sharded else 0.0  # it is shared out after the engine was chosen
    held_by_weights = whole_model or fixed.weights + fixed.master_weights
    own, capacity = _room(machine, device)
    kernel = demand.packed and device.type == "cuda"
    kept = _kept(setup.outline, recipe, settings, demand.longest, bf16=bf16, kernel=kernel)
    engine = decide_engine(kept, demand, weights.trained, device, max(0.0, capacity - own - held_by_weights))
    passes = setup.passes(name, recipe)
    of_device = passes.tokens * largest_share / settings.pairs_per_step
    at_once = name == "stage_two" and not engine.cached_gradients
    held = min(max(engine.micro_batch_tokens, demand.least_tokens), of_device)
    held = (demand.step_tokens or of_device) if at_once else held
    memory = memory_of_stage(
        fixed,
        engine,
        held=held,
        score_bytes=_score_bytes(demand, setup.outline.vocabulary, held, passes),
        embeddings=2 * largest_share * setup.outline.hidden,
        cpu=device.type == "cpu",
    )
    found = StageEstimate(
        engine=engine,
        memory=memory,
        capacity=capacity,
        fits=engine.fits and max(memory.peak, whole_model) <= capacity,
        whole_model=whole_model,
        trained=round(weights.trained),
        tokens=round(passes.tokens * settings.steps),
        flops=settings.steps * flops_of_step(setup.outline, settings, engine, passes),
    )
    if machine is None:
        return found
    on = _On(machine, name, sharded=sharded, bf16=bf16, micro_batches=_micro_batches(engine, of_device, name))
    return _timed_on(found, on, setup.outline, settings, weights, largest_share)


def _room(machine: Machine | None, device: torch.device) -> tuple[float, float]:
    """Bytes that this process takes already on `device`, and all that it may take; on a `machine` that one's."""
    if machine is not None:
        return 0.0, machine.memory - _CONTEXT
    own = memory_of_stage(Memory(), _NOTHING, held=0, score_bytes=0, embeddings=0, cpu=device.type == "cpu").peak
    return own, free_memory(device) + own


def _score_bytes(demand: Demand, vocabulary: int, held: float, passes: Scaled) -> float:
    """What `demand` says of scores, or if less those of the targets in `held` tokens of `passes` over the `vocabulary`.

    Logits, their log-softmax and their gradients, in fp32.
    """
    if not passes.targets:
        return demand.logits_bytes
    return min(demand.logits_bytes, 4 * 4 * vocabulary * held * passes.targets / passes.tokens)


def _kept(
    outline: Outline, recipe: Recipe, settings: StageOne | StageTwo, longest: int, *, bf16: bool, kernel: bool
) -> Callable[[bool], tuple[float, float]]:
    """Bytes that `outline` keeps for a token, and 0 for all, by whether gradient checkpointing is on.

    `kernel`: one attends.
    """
    lora = None if settings.lora is None else (settings.lora.r, settings.lora.dropout)
    attention: Attention = "eager" if recipe.model.attention == "eager" else "kernel" if kernel else "here"
    options: dict[str, Any] = {"bf16": bf16, "longest": longest, "attention": attention, "lora": lora}
    return lambda checkpointing: (kept_for_a_token(outline, checkpointing=checkpointing, **options), 0.0)


def _fixed(weights: Weights, outline: Outline, devices: int, *, sharded: bool, bf16: bool) -> Memory:
    """What one of `devices` holds of the `weights` of a stage, whatever the texts."""
    if sharded:
        parts: dict[str, Any] = {"in_layers": outline.in_layers, "layers": outline.layers, "head": outline.head}
        return shared_out(weights, devices=devices, **parts, bf16=bf16)
    fixed = memory_of_weights(weights, bf16=bf16)
    if devices == 1:
        return fixed
    return replace(fixed, gradients=fixed.gradients + 4 * weights.trained)  # copied to be exchanged


def _micro_batches(engine: Engine, of_device: float, name: StageName) -> int:
    """Of a step that has so many tokens for a device, `of_device`."""
    at_once = name == "stage_two" and not engine.cached_gradients
    return 1 if at_once else max(1, math.ceil(of_device / engine.micro_batch_tokens))


_NOTHING = Engine(packed=True, gradient_checkpointing=False, micro_batch_tokens=1, bytes_per_token=0, fits=True)


def with_precision(recipe: Recipe, machine: Machine | None) -> Recipe:
    """`recipe` with the number format that `auto` is on the GPU `machine`: bf16. Here it is measured."""
    if machine is None or recipe.model.precision != "auto":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": "bf16"})})


def weights_of(outline: Outline, recipe: Recipe, name: StageName, *, bf16: bool) -> Weights:
    """The parameters that the stage `name` of `recipe` holds of `outline`, by what becomes of them, in `bf16` or no."""
    settings: StageOne | StageTwo = getattr(recipe, name)
    writes = name == "stage_one" or (isinstance(settings, StageTwo) and settings.generation_weight > 0)
    head = outline.head if writes else 0  # a tied one is copied for the head too
    linear = outline.linear_parameters + head
    whole = outline.parameters if writes else outline.body_parameters
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
    in_bf16 = outline.linear_parameters + own_head if name == "stage_two" and bf16 else 0
    copied = linear - in_bf16
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
        last=outline.last if lora is None else outline.last_adapters(lora.r),
        frozen=lora is not None,
    )
    again = {"checkpointing": engine.gradient_checkpointing, "cached": engine.cached_gradients}
    exchanged = 0.0
    if isinstance(settings, StageOne) and settings.target != "masked":
        exchanged = (forward_flops(layers, passes) + 2 * layers.head * passes.targets) / settings.log_every
    return step_flops(layers, passes, **again, chunked=passes.targets > 0) + exchanged


@dataclass(frozen=True)
class _On:
    """Where the stage `name` runs: on the devices of `machine`, its weights `sharded` or not, in `bf16` or not.

    A device computes its part of a step in so many `micro_batches`.
    """

    machine: Machine
    name: StageName
    sharded: bool
    bf16: bool
    micro_batches: int


def _timed_on(
    found: StageEstimate,
    on: _On,
    outline: Outline,
    settings: StageOne | StageTwo,
    weights: Weights,
    largest_share: int,
) -> StageEstimate:
    """`found` with its time `on` a machine: arithmetic at the measured share of the peak, and then the optimizer.

    A step takes as long as the device that has the `largest_share` of its pairs, and what it waits for the network.
    """
    machine = on.machine
    ways: dict[str, Any] = {"micro_batches": on.micro_batches, "sharded": on.sharded}
    share = share_of_peak(on.name, outline.hidden, lora=settings.lora is not None, compiled=found.engine.compiled)
    peak = (machine.bf16_tflops if on.bf16 else machine.fp32_tflops) * 1e12
    computing = found.flops / settings.steps * largest_share / settings.pairs_per_step / (share * peak)
    sent = exchanged_bytes(
        weights.trained,
        machine.devices,
        **ways,
        passes=2 if isinstance(settings, StageOne) and settings.target == "text" else 1,
        outside=weights.trained - outline.in_layers if on.sharded else 0,
        bf16=on.bf16,
        candidates=settings.pairs_per_step * (1 + settings.negatives) * outline.hidden
        if isinstance(settings, StageTwo)
        else 0,
    )
    held = weights.trained / (machine.devices if on.sharded else 1)
    casts = on.micro_batches if machine.devices > 1 else 1  # by one process once a step
    moved = _OPTIMIZER_TRAFFIC * held + (_CAST_TRAFFIC * casts * weights.trained_linear if on.bf16 else 0)
    step = computing + waiting_seconds(sent, computing, machine, **ways) + moved / (machine.bandwidth_gbs * 1e9)
    return replace(found, seconds_per_step=step, seconds=step * settings.steps, share=share, exchanged=sent)


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
