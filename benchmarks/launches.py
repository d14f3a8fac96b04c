"""What a GPU does in one kernel as one operation on a CPU, and the count of operations that reach the device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode


@torch.library.custom_op("anchorvec_benchmarks::text_by_text", mutates_args=())
def text_by_text(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Causal attention of (tokens, heads, dim) within each text: what the GPU's kernel gives, text by text."""
    outs = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
        outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(outs, dim=1).transpose(0, 1).contiguous()


@text_by_text.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("anchorvec_benchmarks::text_by_text_backward", mutates_args=())
def text_by_text_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float
) -> list[Tensor]:
    """The gradients of query, key and value."""
    groups = query.shape[1] // key.shape[1]
    found: list[list[Tensor]] = [[], [], []]
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        g, q, k, v = (part[begin:end].transpose(0, 1).float() for part in (gradient, query, key, value))
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)  # (heads, length, dim)
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        p = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1)
        d = g @ v.transpose(1, 2)
        s = scale * p * (d - (d * p).sum(-1, keepdim=True))
        for parts, part in zip(found, (s @ k, s.transpose(1, 2) @ q, p.transpose(1, 2) @ g), strict=True):
            parts.append(part.transpose(0, 1))
    d_q, d_k, d_v = (torch.cat(parts) for parts in found)  # (tokens, heads, dim)
    d_k, d_v = (part.unflatten(1, (-1, groups)).sum(2) for part in (d_k, d_v))
    return [part.to(query.dtype) for part in (d_q, d_k, d_v)]


@text_by_text_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> list[Tensor]:
    return [torch.empty_like(part) for part in (query, key, value)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, starts = ctx.saved_tensors
    return (*text_by_text_backward(gradient.contiguous(), query, key, value, starts, ctx.scale), None, None)


text_by_text.register_autograd(_backward, setup_context=_save)


def one_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *args: Any, scale: float, **options: Any) -> Tensor:
    """Stands for `varlen_attn`, whose arguments it takes."""
    return text_by_text(q, k, v, starts, scale)


@torch.library.custom_op("anchorvec_benchmarks::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own, which is one kernel on a GPU."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("anchorvec_benchmarks::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    """The gradients of input and weight."""
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, g = x * r, gradient * weight
    return [r * (g - n * (g * n).mean(-1, keepdim=True)), (gradient * n).flatten(0, -2).sum(0)]


@rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight)]


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


rms_norm.register_autograd(
    lambda ctx, gradient: (*rms_norm_backward(gradient, *ctx.saved_tensors, ctx.eps), None), setup_context=_save_norm
)


def one_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """Stands for PyTorch's `rms_norm`, whose arguments it takes: one operation where it is one kernel on a GPU."""
    if x.dtype == weight.dtype:
        return rms_norm(x, weight, eps)
    return torch.nn.functional.rms_norm(x, shape, weight, eps)


class Count(TorchDispatchMode):
    """Counts operations by name, without views and allocations, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        ours = func.namespace == "anchorvec_benchmarks"
        if ours or (func.namespace == "aten" and not func.is_view and name not in NOTHING_LAUNCHED):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


NOTHING_LAUNCHED = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
}
