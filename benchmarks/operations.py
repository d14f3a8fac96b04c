"""Operations of one micro-batch on a GPU's code path, counted on a CPU: what the host has to launch.

A micro-batch of Stage I: 64 pairs, SmolLM2-135M's 30 layers, bf16 over fp32 weights, forward and backward; the
attention kernel is one operation. Counted are the leaf operations (aten) that reach the device: views, which launch
nothing, are left out. With `--compile` the decoder layers are compiled, and what is counted is generated kernels and
calls of external ones.

    python benchmarks/operations.py [--compile]
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from anchorvec.model import attention, packing
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from common import SHAPES, make_model
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
    packing.reads_no_mask = lambda device: True


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


def prepared(shape: str, pairs: int, layers: int | None) -> Callable[[], None]:
    """The micro-batch of a model with so many layers."""
    model = make_model(shape, 0)
    if layers is not None:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    batch = draw_pairs(pairs, 0, model.config.vocab_size)
    objective = TextReconstruction(model)
    objective.packed = True
    working = WorkingWeights(objective)

    def step() -> None:
        with working.in_use(), torch.autocast("cpu", torch.bfloat16):
            objective(batch).loss.backward()

    step.compile_layers = objective.compile_layers  # type: ignore[attr-defined]
    return step


def counted(shape: str, pairs: int, layers: int | None) -> Counter[str]:
    """Operations of the micro-batch, by name; weights have gradients already, as in every micro-batch but the first."""
    step = prepared(shape, pairs, layers)
    step()
    with Count() as count:
        step()
    return count.names


def compiled_calls(shape: str, pairs: int) -> int:
    """Generated kernels, and calls of external ones, of one compiled layer: forward and backward pass."""
    step = prepared(shape, pairs, 1)
    step.compile_layers()  # type: ignore[attr-defined]
    _, sources = run_and_get_code(step)
    called = re.compile(r"^ *(?:\w+ = )?(cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.\w+\.\w+(?:\.\w+)?)\(", re.M)
    calls = [called.findall(source) for source in sources]
    layers = [found for found in calls if any("text_by_text" in name for name in found)]
    return sum(map(len, layers))


def main() -> None:
    """Count."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", default="smollm2-135m")
    options.add_argument("--pairs", type=int, default=64)
    options.add_argument("--compile", action="store_true", help="count what is left of a compiled decoder layer")
    options.add_argument("--names", action="store_true", help="show the operations by name")
    chosen = options.parse_args()
    on_gpu_path()
    names = counted(chosen.shape, chosen.pairs, None)
    say = Console().print
    if chosen.names:
        say(json.dumps(names.most_common()))
    say(f"operations: {sum(names.values()):,}")
    if chosen.compile:
        outside = sum(counted(chosen.shape, chosen.pairs, 0).values())
        layer = compiled_calls(chosen.shape, min(chosen.pairs, 4))
        layers = SHAPES[chosen.shape]["num_hidden_layers"]
        total = outside + 2 * layers * layer
        say(f"compiled: {total:,} ({outside:,} outside of the layers, {layer} for a layer and pass)")


if __name__ == "__main__":
    main()
