"""Compiled decoder layers: on a GPU a small model waits for Python, which launches thousands of small operations.

Only the layer is compiled, with lengths left open, and all layers of a model share the result, so that it takes seconds
and not minutes. The arithmetic is the same; where the compiler joins operations it rounds less often.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `model`, those of its own classes; empty for a family that has none to tell."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_decoder_layers(model: PreTrainedModel) -> bool:
    """Have the decoder layers of `model` compiled when they are first used; whether it has any.

    Nothing of it is saved. Gradient checkpointing is left to the layers as they are.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    return bool(layers)


def compiled(function: Any) -> Any:
    """`function`, compiled when it is first called, with sizes left open."""
    return torch.compile(function, dynamic=True)
