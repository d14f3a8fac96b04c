"""Operations of one micro-batch on a GPU's code path, counted on a CPU: what the host has to launch.

A micro-batch of Stage I: 64 pairs, SmolLM2-135M's 30 layers, bf16 over fp32 weights, forward and backward; the
attention kernel is one operation. Counted are the leaf operations (aten) that reach the device: views, which launch
nothing, are left out. With `--compile` the decoder layers are compiled, and what is counted is generated kernels and
calls of external ones.

    python benchmarks/operations.py [--compile]
"""

import argparse
import json
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from anchorvec.model import attention
from anchorvec.objectives.reconstruction import TextReconstruction
from common import make_model
from stage_one import draw_pairs


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


def on_gpu_path() -> None:
    """Have a CPU take the code path of a GPU."""
    attention.varlen_attn = one_kernel
    attention._kernel_dtype = lambda query, value: torch.bfloat16


VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "expand",
    "detach",
    "split",
    "split_with_sizes",
    "permute",
    "as_strided",
    "alias",
    "unbind",
    "reshape",
    "lift_fresh",
    "_reshape_alias",
    "sym_size",
    "empty",
    "new_empty",
    "empty_like",
    "new_empty_strided",
    "empty_strided",
    "unsafe_split",
}


class Count(TorchDispatchMode):
    """Counts operations by name; inside an operation of our own nothing is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if (func.namespace == "aten" and name not in VIEWS) or func.namespace == "anchorvec_benchmarks":
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Count."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", default="smollm2-135m")
    options.add_argument("--pairs", type=int, default=64)
    chosen = options.parse_args()
    on_gpu_path()
    model = make_model(chosen.shape, 0)
    pairs = draw_pairs(chosen.pairs, 0, model.config.vocab_size)
    objective = TextReconstruction(model, packed=False)
    objective.packed = True
    model.set_attn_implementation(attention.PACKED_ATTENTION)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(pairs).loss
        loss.backward()

    with Count() as count:
        step()
    say = Console().print
    say(json.dumps(count.names.most_common()))
    say(sum(count.names.values()))


if __name__ == "__main__":
    main()
