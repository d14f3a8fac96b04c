"""How a stage is computed on this machine: what to hold at a time, from the memory that is free when it starts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anchorvec.device import default_device, resolve_precision
from anchorvec.model.packing import packing_pays
from anchorvec.training.memory import ADAM_BYTES, kept_bytes, tokens_that_fit

ENOUGH_TOKENS = {"cpu": 1_536, "cuda": 65_536}
"""The largest micro-batch by default: matrix products of so many rows run at full speed."""

COMPILE_PAIRS, COMPILE_SECONDS = 20_000, 120.0
"""A stage of so many pairs, or of so much time, has its decoder layers compiled on a GPU, which takes half a minute."""

_LAYER_STATES = 32
"""With gradient checkpointing one layer at a time is computed again; it keeps about so many hidden states a token."""


_CHECKPOINTING = "gradient checkpointing: the longest texts do not fit into the free memory without it"
_CACHED = "cached gradients, every text is encoded twice"
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


def choose_engine(
    model: PreTrainedModel,
    forward: Callable[[int], tuple[Tensor, int]],
    *,
    packed: bool,
    precision: Literal["auto", "bf16", "fp32"],
    gradient_checkpointing: bool | Literal["auto"],
    micro_batch_tokens: int | None,
    longest: int,
    least_tokens: int,
    logits_bytes: int = 0,
    step_tokens: float | None = None,
    long_enough: bool = False,
    padded_because: str = "",
) -> Engine:
    """The way to compute a stage with the memory that is free now; sets gradient checkpointing on `model`.

    `forward` and `longest`, the tokens of the longest text, are as in `kept_bytes`; `logits_bytes` exist beside what is
    kept. `packed`, `precision`, `gradient_checkpointing` and `micro_batch_tokens` are the recipe's. Where it leaves
    checkpointing open, that is used if `least_tokens` would not fit otherwise; cached gradients if the `step_tokens` of
    a step do not fit. Layers are compiled on a GPU if the stage is `long_enough`. `padded_because`: why not `packed`.
    """
    device, bf16 = default_device(), resolve_precision(precision) == "bf16"
    beside = logits_bytes + ADAM_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept_and_fit = partial(_kept_and_fit, model, forward, longest, beside, bf16)
    checkpointing = gradient_checkpointing is True
    if not checkpointing:
        per_token, fit = _or_nothing_fits(kept_and_fit, gradient_checkpointing)
        checkpointing = gradient_checkpointing == "auto" and fit < least_tokens
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        per_token, fit = kept_and_fit(True)
    cached = step_tokens is not None and step_tokens > (micro_batch_tokens or fit)
    slower = {
        f"texts are padded: {padded_because}": not packed,
        _CHECKPOINTING: checkpointing and gradient_checkpointing == "auto",
        f"{_CACHED}: a step of {step_tokens or 0:,.0f} tokens does not fit at once": cached,
        _NOT_COMPILED: device.type == "cuda" and not long_enough,
    }
    held = micro_batch_tokens or max(1, min(fit, ENOUGH_TOKENS.get(device.type, 1_536)))
    return Engine(
        packed=packed,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=held,
        bytes_per_token=round(per_token),
        fits=fit >= max(least_tokens, micro_batch_tokens or 0),
        cached_gradients=cached,
        compiled=long_enough and device.type == "cuda" and packed and not checkpointing,
        slower=tuple(line for line, taken in slower.items() if taken),
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


def _kept_and_fit(
    model: PreTrainedModel,
    forward: Callable[[int], tuple[Tensor, int]],
    longest: int,
    beside: int,
    bf16: bool,
    checkpointing: bool,
) -> tuple[float, int]:
    """Bytes that are kept for a token, and the tokens that fit into the free memory `beside` so many bytes."""
    device = default_device()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        per_token, fixed = kept_bytes(model, forward, longest)
    if checkpointing:
        per_token += _LAYER_STATES * model.config.get_text_config().hidden_size * (2 if bf16 else 4)
    return per_token, tokens_that_fit(per_token, beside + fixed, device)


def compiling_pays(pairs: int, seconds: float | None) -> bool:
    """Whether a stage of so many pairs, or seconds where it has a deadline, is long enough to be compiled."""
    return pairs >= COMPILE_PAIRS if seconds is None else seconds >= COMPILE_SECONDS


UNPACKABLE = "the model's layers do not keep packed texts apart"
"""Why texts are padded where only the model stands against packing."""


def why_padded(attention: str, precision: Literal["auto", "bf16", "fp32"]) -> str:
    """Why a stage must pad its texts; empty where it packs them, if the model can.

    Packing must pay in its `precision` on this device, and the recipe name no `attention`.
    """
    if attention != "auto":
        return f"model.attention is {attention}"
    dtype = torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32
    device = default_device()
    return "" if packing_pays(device, dtype) else f"on {device.type} in {dtype} that is faster".replace("torch.", "")
