"""The LM head: from states to logits as the model itself goes, and the cross-entropy over the vocabulary."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

HEAD_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Logits that exist at one time, in fp32, by device: on a CPU 523 target tokens over a vocabulary of 128,256."""


def head_chunk_bytes(device: torch.device) -> int:
    """`HEAD_CHUNK_BYTES` of `device`; of one that is not named, what a CPU takes."""
    return HEAD_CHUNK_BYTES.get(device.type, HEAD_CHUNK_BYTES["cpu"])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `logits` (tokens, vocabulary) against `targets` (tokens,), for each token, in fp32 at least."""
    # bf16 sums too coarsely over a vocabulary
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits, targets, reduction="none")


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from final states (tokens, dim) to logits (tokens, vocabulary) that `model` itself applies.

    It is the causal LM's own forward with the decoder taken out, so soft caps and scales around the LM head are
    the model's (T19).
    """
    head = copy.copy(model)  # shallow: the same LM head module and the same parameters
    head._modules = dict(model._modules)
    decoder = _GivenStates()
    head._modules[model.base_model_prefix] = decoder

    def project(states: Tensor) -> Tensor:
        decoder.states = states[None]
        logits: Tensor = head.forward(inputs_embeds=states[None], use_cache=False, return_dict=True).logits
        return logits[0]

    return project


class _GivenStates(nn.Module):
    """Stands where the decoder was: gives back the states it was handed."""

    states: Tensor

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)
