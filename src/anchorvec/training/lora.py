"""LoRA adapters on the layers of a decoder that can have them, and which have none."""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anchorvec.errors import AnchorvecError


def add_lora(model: PreTrainedModel, body: nn.Module, settings: Mapping[str, Any], *, key: str) -> None:
    """Put adapters on the linear layers of `body`, a part of `model`, and freeze all else; `merged` takes them in.

    `settings` are the options of `lora_config`, `key` what a recipe calls them.
    """
    get_peft_model(model, lora_config(body, key=key, **settings))


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with what its adapters have learned in its own weights, and without adapters."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model


def lora_config(body: nn.Module, *, r: int, alpha: float, dropout: float, key: str = "stage_two.lora") -> LoraConfig:
    """Adapters of rank `r`, scale `alpha` / `r` and `dropout` on the linear layers of `body`.

    Warns of weights that are multiplied by elsewhere, and have none. These are stacked experts, for one, whose adapters
    peft has no dropout for, and with them the linear layers whose names it takes for an expert's. Raises AnchorvecError
    where no layer is left, for the recipe's `key`.
    """
    linear = {name for name, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    adapted = linear - _taken_for_experts(body, linear)
    others = [
        name
        for name, weight in body.named_parameters()
        if weight.dim() > 1 and name.rpartition(".")[0] not in adapted and not _is_table(body, name)
    ]
    if not adapted:
        raise AnchorvecError(f"{key}: the model has no linear layer that can be adapted; set it to null")
    if others:
        # the same weights of all layers as one
        names = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name).removesuffix(".weight") for name in others)
        warnings.warn(f"LoRA adapts linear layers; without adapters, and frozen: {', '.join(names)}", stacklevel=2)
    # By name: "all-linear" would add the experts.
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(adapted), task_type="FEATURE_EXTRACTION"
    )


def _taken_for_experts(body: nn.Module, linear: set[str]) -> set[str]:
    """Those of the layers `linear` that peft would look for among stacked experts, by their names."""
    module = "peft.utils.transformers_weight_conversion"  # since 0.19
    if importlib.util.find_spec(module) is None:
        return set()
    convert: Any = importlib.import_module(module).convert_peft_config_for_transformers
    kept = LoraConfig(target_modules=sorted(linear))
    convert(kept, model=body, conversions=None)
    return linear - set(kept.target_modules or ())


def _is_table(body: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is that of an embedding, which is looked up."""
    return isinstance(body.get_submodule(name.rpartition(".")[0]), nn.Embedding)
