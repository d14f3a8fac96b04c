"""bf16 copies of fp32 weights, made once an optimizer step instead of at each use.

Under autocast every linear layer converts its fp32 weight whenever it is used: in each micro-batch, again where
activations are computed again, and for each chunk of the LM head. Here the layers hold bf16 copies for the length of a
step. Autocast has nothing left to convert, so the arithmetic is the same bit for bit; the copies' gradients are added
to those of the fp32 weights in fp32 as they arrive, which is what autocast does too. The optimizer knows the fp32
weights alone (T9).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WorkingWeights:
    """The bf16 copies of what the linear layers of `model` multiply by, LoRA's and the LM head included.

    Frozen weights are copied once. A weight that is also the token embeddings (a tied LM head) has a copy for the head;
    the embeddings are looked up in fp32.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []  # module, name, fp32, copy
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                continue
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype != torch.float32:
                    continue
                copy = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=weight.requires_grad)
                if copy.requires_grad:
                    copy.register_post_accumulate_grad_hook(_hand_over_to(weight))  # type: ignore[no-untyped-call]
                self._places.append((module, name, weight, copy))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers hold the copies, which are made anew at the start, for a step's forward and backward passes."""
        with torch.no_grad():
            for *_, weight, copy in self._places:
                if weight.requires_grad:
                    copy.copy_(weight)
        try:
            for module, name, _, copy in self._places:
                module._parameters[name] = copy
            yield
        finally:
            for module, name, weight, _ in self._places:
                module._parameters[name] = weight


def _hand_over_to(weight: nn.Parameter) -> Callable[[Tensor], None]:
    """The hook that adds the gradient of a copy to that of `weight`, in fp32, and frees it."""

    def hand_over(copy: Tensor) -> None:
        assert copy.grad is not None
        if weight.grad is None:
            weight.grad = copy.grad.to(weight.dtype)
        else:
            weight.grad.add_(copy.grad)
        copy.grad = None

    return hand_over
