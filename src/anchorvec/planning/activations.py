"""What autograd keeps for a token, counted on layers without data: nothing is computed, and no memory taken."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from anchorvec.model.attention import packed_attention
from anchorvec.model.decoder import decoder_of
from anchorvec.planning.outline import Outline
from anchorvec.training.engine import LAYER_STATES
from anchorvec.training.lora import lora_config
from anchorvec.training.memory import kept_bytes

_PART_TOKENS = 64

Attention = Literal["here", "kernel", "eager"]
"""Packed texts as they are attended to on a CPU, or by a kernel that reads grouped heads as they are; or matrices."""


def _text_by_text(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As `packed_attention` attends on a CPU, which puts the texts one after another again."""
    return packed_attention(*args, **kwargs)[0].clone(), None


# Under names that transformers make no mask for: without data they cannot see that none is needed.
_NAMES: dict[Attention, str] = {"here": "anchorvec_text_by_text", "kernel": "anchorvec_kernel", "eager": "eager"}
AttentionInterface.register(_NAMES["here"], _text_by_text)
AttentionInterface.register(_NAMES["kernel"], sdpa_attention_forward)

_COUNTED: dict[tuple[Any, ...], float] = {}
"""What was counted, by the configuration and the options."""


class _Adapted(nn.Module):
    """A frozen linear layer with an adapter, as peft computes it: the input in fp32 through dropout, then A, then B."""

    def __init__(self, base: Any, r: int, dropout: float) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(columns, r, bias=False), nn.Linear(r, rows, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + 2.0 * self.b(self.a(self.dropout(x.float())))
        return adapted


def kept_for_a_token(
    outline: Outline,
    *,
    bf16: bool,
    checkpointing: bool,
    longest: int,
    attention: Attention = "here",
    lora: tuple[int, float] | None = None,
) -> float:
    """Bytes that the decoder of `outline` keeps for a token until the backward pass.

    In `bf16` under autocast, or in fp32; with gradient `checkpointing` the input of each layer, and one layer at a
    time. Texts have at most `longest` tokens, which matters where `attention` keeps matrices. `lora`: rank and dropout
    of adapters, on frozen weights. Counted on one layer and on two, of the real shape: all others are alike.
    """
    if checkpointing:  # as the engine counts it: the states between layers, in fp32, and one layer's own
        return 4.0 * outline.hidden * outline.layers + LAYER_STATES * outline.hidden * (2 if bf16 else 4)
    counted = []
    for layers in sorted({1, min(2, outline.layers)}):
        # a comparison plans many runs of one model
        key = (outline.config.to_json_string(use_diff=False), layers, bf16, longest, attention, lora)
        if key not in _COUNTED:
            _COUNTED[key] = _counted(outline, *key[1:])
        counted.append(_COUNTED[key])
    return counted[0] + (outline.layers - 1) * (counted[-1] - counted[0])


def _counted(
    outline: Outline, layers: int, bf16: bool, longest: int, attention: Attention, lora: tuple[int, float] | None
) -> float:
    name = _NAMES[attention]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(outline.cut(layers), attn_implementation=name).train()
        body = decoder_of(model)
        if lora is not None:
            body.requires_grad_(False)
            for name in list(lora_config(body, r=lora[0], alpha=1, dropout=0.0).target_modules or ()):
                parent, _, child = name.rpartition(".")
                setattr(body.get_submodule(parent), child, _Adapted(body.get_submodule(name), *lora))

        def forward(n: int) -> tuple[Tensor, int]:
            embedded = torch.empty(1, n * _PART_TOKENS, outline.hidden, requires_grad=lora is None)
            return body(inputs_embeds=embedded, use_cache=False, return_dict=True)[0], n * _PART_TOKENS

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return kept_bytes(body, forward, longest)[0]
