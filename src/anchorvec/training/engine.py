"""How a stage is computed on this machine: what to hold at a time, from the memory that is free when it starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anchorvec.device import default_device, resolve_precision
from anchorvec.model.packing import packing_pays
from anchorvec.processes import gathered
from anchorvec.training.memory import ADAM_BYTES, kept_bytes, tokens_that_fit

ENOUGH_TOKENS = {"cpu": 1_536, "cuda": 65_536}
"""The largest micro-batch by default: matrix products of so many rows run at full speed."""

COMPILE_PAIRS, COMPILE_SECONDS = 20_000, 120.0
"""A stage of so many pairs, or of so much time, has its decoder layers compiled on a GPU, which takes half a minute."""

LAYER_STATES = 32
"""With gradient checkpointing one layer at a time is computed again; it keeps about so many hidden states a token."""


_CHECKPOINTING = "gradient checkpointing: the longest texts do not fit into the free memory without it"
_CACHED = "cached gradients, every text is encoded twice"
_CONVERTED = "weights are converted to bf16 in each micro-batch: on several devices not once a step"
_TEXT_BY_TEXT = "attention runs text by text: no kernel for packed texts has dropout"
_NOT_COMPILED = "layers are not compiled: the stage is too short for it to pay"


@dataclass(frozen=True)
class Engine:
    """How a stage is computed on this machine. Its time and memory depend on it, its result only by rounding.

    (And by the random draws of dropout, where there is any.) `compiled`: the decoder layers are compiled when the stage
    starts. `bytes_per_token` are those of the activations that are
    kept for the backward pass; `fits` says whether the least that must be held at one time fits into the memory that
    was free. A step of Stage II with `cached_gradients` encodes every text twice. `slower`: each slower way that was
    taken, and why.
    """

    packed: bool
    gradient_checkpointing: bool
    micro_batch_tokens: int
    bytes_per_token: int
    fits: bool
    cached_gradients: bool = False
    compiled: bool = False
    slower: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demand:
    """What a stage wants to hold, and what its recipe leaves open.

    `packed`, and `padded_because`, why not. `precision`, `gradient_checkpointing` and `micro_batch_tokens` are the
    recipe's. `longest`: the tokens of the longest text; `least_tokens`: those that must be held at one time;
    `logits_bytes` exist beside what is kept; `devices`: those of the run; `shards`: those that the weights are shared
    out among; `step_tokens`: those of a step that would best be held at once, with cached gradients where they do not
    fit. `long_enough`: compiling the layers pays.
    """

    packed: bool
    precision: Literal["auto", "bf16", "fp32"]
    gradient_checkpointing: bool | Literal["auto"]
    micro_batch_tokens: int | None
    longest: int
    least_tokens: int
    logits_bytes: int = 0
    devices: int = 1
    shards: int = 1
    step_tokens: float | None = None
    long_enough: bool = False
    padded_because: str = ""
    attention_dropout: float = 0.0


def choose_engine(model: PreTrainedModel, forward: Callable[[int], tuple[Tensor, int]], demand: Demand) -> Engine:
    """The way to compute a stage of `model` on this machine with the memory that is free now.

    `forward` is as in `kept_bytes`, `demand` what the stage wants to hold. Sets gradient checkpointing on `model`.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return decide_engine(lambda checkpointing: kept_by(model, forward, demand, checkpointing), demand, trained)


def decide_engine(
    kept: Callable[[bool], tuple[float, float]],
    demand: Demand,
    trained: float,
    device: torch.device | None = None,
    free: float | None = None,
) -> Engine:
    """The way to compute a stage with such a `demand` that trains so many parameters, `trained`, here or on a `device`.

    `kept`: the bytes kept for a token, and whatever their number, with gradient checkpointing or without. `free`: the
    bytes that are free beside the weights; None: those of this machine, now. Where the recipe leaves checkpointing
    open, that is used if the least that must be held would not fit otherwise.
    """
    device = device or default_device()
    # DDP copies the gradients, in fp32, to exchange them
    copied = 4 if demand.devices > 1 and demand.shards == 1 else 0
    beside = demand.logits_bytes + (ADAM_BYTES + copied) * trained / demand.shards

    def kept_and_fit(checkpointing: bool) -> tuple[float, int]:
        per_token, fixed = kept(checkpointing)
        return per_token, tokens_that_fit(per_token, beside + fixed, device, free)

    asked, micro_batch_tokens = demand.gradient_checkpointing, demand.micro_batch_tokens
    checkpointing = asked is True
    if not checkpointing:
        per_token, fit = _or_nothing_fits(kept_and_fit, asked)
        checkpointing = asked == "auto" and fit < demand.least_tokens
    if checkpointing:
        per_token, fit = kept_and_fit(True)
    step_tokens = demand.step_tokens
    cached = step_tokens is not None and step_tokens > (micro_batch_tokens or fit)
    too_large = (
        f"is more than micro_batch_tokens, {micro_batch_tokens}" if micro_batch_tokens else "does not fit at once"
    )
    bf16 = resolve_precision(demand.precision) == "bf16"
    slower = {
        f"texts are padded: {demand.padded_because}": not demand.packed,
        _CHECKPOINTING: checkpointing and asked == "auto",
        f"{_CACHED}: a step of {step_tokens or 0:,.0f} tokens {too_large}": cached,
        _CONVERTED: demand.devices > 1 and bf16,
        _TEXT_BY_TEXT: demand.packed and demand.attention_dropout > 0 and bf16,
        _NOT_COMPILED: device.type == "cuda" and not demand.long_enough,
    }
    held = micro_batch_tokens or max(1, min(fit, ENOUGH_TOKENS.get(device.type, 1_536)))
    return Engine(
        packed=demand.packed,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=held,
        bytes_per_token=round(per_token),
        fits=fit >= max(demand.least_tokens, micro_batch_tokens or 0),
        cached_gradients=cached,
        compiled=demand.long_enough and device.type == "cuda" and demand.packed and not checkpointing,
        slower=tuple(line for line, taken in slower.items() if taken),
    )


def agreed(engine: Engine, model: PreTrainedModel) -> Engine:
    """The `engine` that every process takes for its share: what fits into the memory of all.

    Sets gradient checkpointing on `model` where another one needs it.
    """
    flags = [engine.gradient_checkpointing, engine.cached_gradients, engine.compiled, engine.fits]
    tokens, checkpointing, cached, compiled, fits = zip(*gathered([engine.micro_batch_tokens, *flags]), strict=True)
    if any(checkpointing) and not engine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return replace(
        engine,
        micro_batch_tokens=min(tokens),
        gradient_checkpointing=any(checkpointing),
        cached_gradients=any(cached),
        compiled=all(compiled),
        fits=all(fits),
    )


def _or_nothing_fits(
    kept_and_fit: Callable[[bool], tuple[float, int]], gradient_checkpointing: bool | Literal["auto"]
) -> tuple[float, int]:
    """What is kept and fits without checkpointing; nothing, where finding that out takes more memory than there is."""
    try:
        return kept_and_fit(False)
    except torch.OutOfMemoryError:
        if gradient_checkpointing is False:
            raise
        return 0.0, -1


def kept_by(
    model: PreTrainedModel, forward: Callable[[int], tuple[Tensor, int]], demand: Demand, checkpointing: bool
) -> tuple[float, float]:
    """The bytes that `model` keeps for a token, and whatever their number, as `kept_bytes` finds them with `forward`.

    In the format of `demand`. With `checkpointing` gradient checkpointing is set on `model`.
    """
    bf16 = resolve_precision(demand.precision) == "bf16"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        per_token, fixed = kept_bytes(model, forward, demand.longest)
    if checkpointing:
        per_token += LAYER_STATES * model.config.get_text_config().hidden_size * (2 if bf16 else 4)
    return per_token, fixed


def compiling_pays(pairs: int, seconds: float | None) -> bool:
    """Whether a stage of so many pairs, or seconds where it has a deadline, is long enough to be compiled."""
    return pairs >= COMPILE_PAIRS if seconds is None else seconds >= COMPILE_SECONDS


UNPACKABLE = "the model's layers do not keep packed texts apart"
"""Why texts are padded where only the model stands against packing."""


def why_padded(attention: str, precision: Literal["auto", "bf16", "fp32"], device: torch.device | None = None) -> str:
    """Why a stage must pad its texts; empty where it packs them, if the model can.

    Packing must pay in its `precision` on this `device`, or another one, and the recipe name no `attention`.
    """
    if attention != "auto":
        return f"model.attention is {attention}"
    dtype = torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32
    device = device or default_device()
    return "" if packing_pays(device, dtype) else f"on {device.type} in {dtype} that is faster".replace("torch.", "")
