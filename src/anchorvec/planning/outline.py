"""A model without weights: its sizes, from its configuration, and small ones of its family that can be run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anchorvec.model.compiling import decoder_layers
from anchorvec.model.decoder import decoder_of
from anchorvec.training.lora import lora_config
from anchorvec.training.sharding import layers_to_share

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Sizes of a model that does what its family does in no time; of those that the family has."""


@dataclass(frozen=True)
class Outline:
    """The causal LM of `config` as tensors without data, of which sizes alone are asked. `has_head`: it is kept."""

    config: PreTrainedConfig
    has_head: bool = True

    @cached_property
    def model(self) -> Any:
        """The causal LM on the device `meta`: shapes alone."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @cached_property
    def body(self) -> nn.Module:
        """Its decoder, without the LM head."""
        body: nn.Module = decoder_of(self.model)
        return body

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """Numbers of a state."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Tokens that the LM head scores."""
        return int(self.config.vocab_size)

    @property
    def attention_width(self) -> int:
        """Numbers of all heads' queries of a token."""
        heads = int(getattr(self.config, "num_attention_heads", 0))
        return heads and heads * int(getattr(self.config, "head_dim", None) or self.hidden // heads)

    @cached_property
    def body_parameters(self) -> int:
        """Of the decoder, token embeddings included."""
        return sum(p.numel() for p in self.body.parameters())

    @cached_property
    def parameters(self) -> int:
        """Of the model as it is kept, a tied head counted once."""
        return sum(p.numel() for p in self.model.parameters()) if self.has_head else self.body_parameters

    @property
    def head(self) -> int:
        """Weights that the LM head multiplies by, its own or the token embeddings'."""
        return self.vocabulary * self.hidden

    @cached_property
    def linear(self) -> int:
        """Weights of the decoder that each token is multiplied by; of stacked experts those that it goes through."""
        layers = sum(
            m.get_parameter("weight").numel() for m in self.body.modules() if isinstance(m, nn.Linear | Conv1D)
        )
        active, experts = (
            next((int(v) for key in keys if isinstance(v := getattr(self.config, key, None), int) and v), 1)
            for keys in (("num_experts_per_tok", "moe_topk"), ("num_local_experts", "num_experts", "n_routed_experts"))
        )
        stacked = sum(p.numel() for p in self.body.parameters() if p.dim() == 3)
        return layers + round(stacked * min(1.0, active / experts))

    @cached_property
    def _last_layers(self) -> list[nn.Module]:
        """The linear layer that each decoder layer ends with, by their order."""
        layers = decoder_layers(self.model)
        linear = ([m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)] for layer in layers)
        return [found[-1] for found in linear if found]

    @property
    def last(self) -> int:
        """Weights of the products that decoder layers end with."""
        return sum(layer.get_parameter("weight").numel() for layer in self._last_layers)

    def last_adapters(self, r: int) -> int:
        """Weights of the adapters of rank `r` that decoder layers end with: those that are multiplied by last, B."""
        return r * self.hidden * len(self._last_layers)

    @cached_property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linear layers, biases too, of which bf16 copies are made."""
        return sum(p.numel() for m in self.body.modules() if isinstance(m, nn.Linear) for p in m.parameters())

    @cached_property
    def in_layers(self) -> int:
        """Parameters of the decoder layers. Raises AnchorvecError for a family whose layers cannot be shared out."""
        return sum(p.numel() for layer in layers_to_share(self.model) for p in layer.parameters())

    @cached_property
    def tied(self) -> bool:
        """Whether the LM head is the token embeddings."""
        head = self.model.get_output_embeddings()
        return head is None or head.weight is self.model.get_input_embeddings().weight

    def adapters(self, r: int) -> int:
        """Parameters of LoRA adapters of rank `r` on the decoder's linear layers."""
        names = lora_config(self.body, r=r, alpha=r, dropout=0.0).target_modules or ()
        return sum(r * sum(self.body.get_submodule(name).get_parameter("weight").shape) for name in names)

    def cut(self, layers: int) -> PreTrainedConfig:
        """The configuration of a model of so many `layers`, each as it is."""
        return _with_layers(self.config, layers)

    def small(self) -> PreTrainedConfig:
        """The configuration of a model of two small layers, and as many tokens and positions as this one has."""
        config = _with_layers(self.config, min(2, self.layers))
        for name, size in _SMALL.items():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, size)
        return config


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    cut, before = copy.deepcopy(config), config.num_hidden_layers
    cut.num_hidden_layers = layers
    for name, value in vars(config).items():  # one entry a layer, such as `layer_types`
        if isinstance(value, list) and len(value) == before:
            setattr(cut, name, value[:layers])
    return cut


def random_weights(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of `config` in fp32 with weights that `seed` draws, on the CPU."""
    with _drawn_from(seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_random(config: PreTrainedConfig, tokenizer: Any, folder: Path, seed: int) -> Path:
    """A base model of `config` with random weights and `tokenizer`, drawn with `seed`, in `folder`."""
    random_weights(config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
