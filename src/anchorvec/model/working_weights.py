"""bf16 copies of fp32 weights, made once an optimizer step instead of at each use.

Under autocast every linear layer converts its fp32 weight whenever it is used: in each micro-batch, again where
activations are computed again, and for each chunk of the LM head. Here the layers hold bf16 copies for the length of a
step. Autocast has nothing left to convert, so the arithmetic is the same bit for bit; the copies' gradients are added
to those of the fp32 weights in fp32, many at once, which is what autocast does too. The optimizer knows the fp32
weights alone (T9).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchorvec.model.fused import Forward, LinearTogether, fused_norms, fused_rotary, in_place_of, shared_inputs

_ARRIVED_BYTES = 2**28
"""Gradients in bf16 that wait to be added together; in fp32 they take twice as much for a moment."""


class WorkingWeights:
    """The bf16 copies of what the linear layers of `model` multiply by, LoRA's and the LM head included.

    Frozen weights are copied once. A weight that is also the token embeddings (a tied LM head) has a copy for the head;
    the embeddings are looked up in fp32. With `fuse` the host has less to launch for the length of a step, as the
    module `fused` says: for norms, rotation, and the products of layers of one input, whose copies stand one below
    another. The result then differs by rounding.
    """

    def __init__(self, model: nn.Module, *, fuse: bool = False) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []  # module, name, fp32, copy
        self._copied: list[tuple[Tensor, nn.Parameter]] = []  # what is made anew each step: copy, fp32
        self._arrived: dict[nn.Parameter, Tensor] = {}  # gradients that are not added yet
        self._together: list[LinearTogether] = []
        self._fused: dict[nn.Module, Forward] = {}
        decoder = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        self.own_way: tuple[str, ...] = ()  # what `fuse` found no such part of, so that the model's own code does it
        if fuse and decoder is not None:
            norms, rotary = fused_norms(decoder), fused_rotary(decoder)
            self._fused = norms | rotary
            for layers in shared_inputs(decoder):
                self._join(layers)
            compiled = any(module._compiled_call_impl is not None for module in decoder.modules())
            parts = {
                "norms": norms or compiled,
                "rotation of query and key": rotary or compiled,
                "products of one input": self._together,
            }
            self.own_way = tuple(name for name, found in parts.items() if not found)
        joined = set(self._fused)
        for module in model.modules():
            if not isinstance(module, nn.Linear) or module in joined:
                continue
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype != torch.float32:
                    continue
                copy = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=weight.requires_grad)
                if copy.requires_grad:
                    copy.register_post_accumulate_grad_hook(self._take([weight]))  # type: ignore[no-untyped-call]
                    self._copied.append((copy.detach(), weight))
                self._places.append((module, name, weight, copy))

    def _join(self, layers: Sequence[nn.Linear]) -> None:
        """Have `layers`, of one input, multiplied by a copy of all their weights in one."""
        if layers[0].weight.dtype != torch.float32:
            return
        copies: list[Tensor | None] = []
        for name in ("weight", "bias"):
            own = [layer._parameters[name] for layer in layers]
            weights = [weight for weight in own if weight is not None]
            if not weights:
                copies.append(None)
                continue
            whole = torch.cat([weight.detach() for weight in weights]).to(torch.bfloat16)
            copy = nn.Parameter(whole, requires_grad=weights[0].requires_grad)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(self._take(weights))  # type: ignore[no-untyped-call]
                sizes = [len(weight) for weight in weights]
                self._copied += zip(torch.split(copy.detach(), sizes), weights, strict=True)
            copies.append(copy)
        weight, bias = copies
        assert weight is not None
        together = LinearTogether(layers, weight, bias)
        self._together.append(together)
        self._fused |= together.forwards()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers hold the copies, which are made anew at the start, for a step's forward and backward passes."""
        if self._copied:
            copies, weights = zip(*self._copied, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)
        try:
            for module, name, _, copy in self._places:
                module._parameters[name] = copy
            with in_place_of(self._fused):
                yield
            self._hand_over()
        finally:
            self._arrived.clear()
            for module, name, weight, _ in self._places:
                module._parameters[name] = weight
            for together in self._together:
                together.forget()

    def _take(self, weights: Sequence[nn.Parameter]) -> Callable[[Tensor], None]:
        """The hook that takes the gradient of a copy of `weights`, one below another, and leaves the copy none."""
        sizes = [len(weight) for weight in weights]

        def take(copy: Tensor) -> None:
            assert copy.grad is not None
            if weights[0] in self._arrived:  # of the micro-batch before
                self._hand_over()
            self._arrived.update(zip(weights, torch.split(copy.grad, sizes), strict=True))
            copy.grad = None
            if sum(gradient.nbytes for gradient in self._arrived.values()) >= _ARRIVED_BYTES:
                self._hand_over()

        return take

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Add what has arrived to the gradients of the fp32 weights, in fp32, in one operation for all."""
        if not self._arrived:
            return
        arrived = [torch.empty_like(weight) for weight in self._arrived]
        torch._foreach_copy_(arrived, list(self._arrived.values()))
        have = [(weight.grad, gradient) for weight, gradient in zip(self._arrived, arrived, strict=True)]
        there = [(grad, gradient) for grad, gradient in have if grad is not None]
        if there:
            torch._foreach_add_(*map(list, zip(*there, strict=True)))
        for weight, gradient in zip(self._arrived, arrived, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad
        self._arrived.clear()
