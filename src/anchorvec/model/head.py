"""The LM head: from states to logits as the model itself goes, and the cross-entropy over the vocabulary."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchorvec.errors import AnchorvecError

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

    It is the causal LM's own forward, around a decoder that gives back what it gave for one token, with other final
    states in it: so soft caps and scales around the LM head are the model's (T19), and whatever else a forward reads of
    its decoder's output (router logits, caches, cross attentions) or of its decoder is there. The model runs once, on
    that token; use the function again rather than ask for another. Raises AnchorvecError for a forward without a
    decoder of its own in it.
    """
    path, output = _decoder_call(model)
    head: Any = copy.copy(model)  # shallow: the same LM head module and the same parameters
    decoder: Any = head
    for name in path.split("."):
        decoder._modules = dict(decoder._modules)
        decoder._modules[name] = copy.copy(decoder._modules[name])
        decoder = decoder._modules[name]

    def project(states: Tensor) -> Tensor:
        decoder.forward = lambda *args, **kwargs: _with_final_states(output, states[None])
        logits: Tensor = head.forward(inputs_embeds=states[None], use_cache=False, return_dict=True).logits
        return logits[0]

    return project


def _decoder_call(model: PreTrainedModel) -> tuple[str, Any]:
    """The name of the decoder within `model`, and what it gives the causal LM's forward for one token.

    It is the first of the modules which that forward itself calls, not those called by another one, that gives more
    than a tensor.
    """
    calls: list[tuple[nn.Module, Any]] = []
    depth = 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, _: object, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append((module, output))

    names = {module: name for name, module in model.named_modules() if module is not model}
    hooks = [hook for m in names for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    training = model.training
    try:
        with torch.no_grad():
            embedded = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=model.device))
            calls.clear()
            model.eval()(inputs_embeds=embedded, use_cache=False, return_dict=True)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for module, output in calls:
        if not isinstance(output, Tensor) and isinstance(output[0], Tensor):
            return names[module], output
    raise AnchorvecError(f"{type(model).__name__}: there is no decoder in it apart from what computes the logits")


def _with_final_states(output: Any, states: Tensor) -> Any:
    """A copy of a decoder's `output` with `states` (1, tokens, dim) as its final ones, which stand first."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    given = copy.copy(output)
    given[next(iter(given))] = states
    return given
