"""LoRA adapters on the layers of a decoder that can have them, and which have none."""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anchorvec.errors import AnchorvecError


def add_lora(model: PreTrainedModel, body: nn.Module, settings: Mapping[str, Any], *, key: str) -> None:
    """Put adapters on the linear layers of `body`, a part of `model`, and freeze all else; `merged` takes them in.

    `settings` are the options of `lora_config`, `key` what a recipe calls them.
    """
    get_peft_model(model, lora_config(body, key=key, **settings))


def fuse_adapters(model: nn.Module) -> None:
    """Have the adapters of `model` add to what their layers give in one operation, not in three.

    The scale goes to what is as wide as the rank. For bf16 under autocast, where the sum is rounded once, not twice.
    """
    for module in model.modules():
        if type(module) is AdaptedLinear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = _FusedLinear


class _FusedLinear(AdaptedLinear):  # type: ignore[misc]
    """peft's layer, x W' + scale (x A') B', as x W' + (scale x A') B'."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives for `x` (..., in), the adapter's part included: (..., out)."""
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or len(self.active_adapters) != 1:
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        [name] = self.active_adapters
        a, b = self.lora_A[name], self.lora_B[name]
        low = a(self.lora_dropout[name](x)) * self.scaling[name]
        result: Tensor = self.base_layer(x)
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.weight.t()).view_as(result)


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
