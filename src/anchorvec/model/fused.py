"""Fewer, larger operations in place of those that a family's modules are written in, for a step on a GPU.

A small model waits for the host, which launches one operation after another. Three parts of a decoder are written in
many that can be few, whatever the family; what a module is, is seen from what it does on random input.

- **RMSNorm**, y = x / sqrt(mean(x^2) + eps) * w, or (1 + w): PyTorch's own, one kernel forward and one backward.
- **Rotary embedding**, y = x cos + (-x_2, x_1) sin: query and key together, with s = (-sin_1, sin_2) as
  y = x cos + roll(x) s. Its result is in the format in which attention reads it.
- **Linear layers of one input** (query, key, value; gate and up): one product with their weights one below another.

A module that is none of these goes its own way. Products and sums are the same; where several roundings become one, the
result differs by that.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedModel

from anchorvec.model.decoder import final_states

_ROTARY = "apply_rotary_pos_emb"
"""The name under which families of transformers know the rotation of query and key."""

Forward = Callable[..., Any]


def fused_norms(model: nn.Module) -> dict[nn.Module, Forward]:
    """The modules of `model` that are an RMSNorm, each with a `forward` of one operation."""
    found = {}
    for module in _not_compiled(model):
        if (form := _rms_norm_form(module)) is not None:
            found[module] = _norm_forward(module, *form)
    return found


def fused_rotary(model: nn.Module) -> dict[nn.Module, Forward]:
    """The attention layers of `model` that rotate query and key, each with a `forward` that rotates both at once."""
    together: dict[Forward, Forward] = {}
    found: dict[nn.Module, Forward] = {}
    for module in _not_compiled(model):
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or _ROTARY not in forward.__code__.co_names:
            continue
        own = forward.__globals__.get(_ROTARY)
        if own is None:
            continue
        if own not in together:
            rotate = _RotaryTogether(own)
            together[own] = rotate if rotate.is_own() else own
        if together[own] is not own:
            names = {**forward.__globals__, _ROTARY: together[own]}
            changed = types.FunctionType(
                forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
            )
            changed.__kwdefaults__ = forward.__kwdefaults__
            found[module] = types.MethodType(changed, module)
    return found


def shared_inputs(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The linear layers of the decoder `model` that it calls one after another with one and the same input.

    In the order of the calls. Each is called once; those of a group are all trained, or all frozen, and have the same
    number format. Runs the model once, on two tokens.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []  # keeps the inputs, so that no two are the same by chance
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    training = model.training
    try:
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, torch.bfloat16),
            torch.compiler.set_stance("force_eager"),
        ):
            table: nn.Module = model.get_input_embeddings()
            final_states(model.eval(), inputs_embeds=table.get_parameter("weight")[None, :2])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    groups: list[list[nn.Linear]] = []
    before = None
    for module, given in calls:
        if given is before and _alike(groups[-1][0], module):
            groups[-1].append(module)
        else:
            groups.append([module])
        before = given
    once = {module for module, _ in calls if sum(module is other for other, _ in calls) == 1}
    return [group for group in groups if len(group) > 1 and once.issuperset(group)]


def _alike(a: nn.Linear, b: nn.Linear) -> bool:
    def kind(module: nn.Linear) -> tuple[Any, ...]:
        return module.in_features, module.bias is None, module.weight.dtype, module.weight.requires_grad

    return kind(a) == kind(b)


class LinearTogether:
    """The layers of a group of `shared_inputs` as one product.

    `weight` (sum of outputs, inputs) and `bias`, or None, are theirs, one below another. The first of them that is
    given an input computes the outputs of all, which stay until the last has taken its own.
    """

    def __init__(self, layers: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None) -> None:
        self.layers, self.weight, self.bias = layers, weight, bias
        self.sizes = [layer.out_features for layer in layers]
        self.forget()

    def forget(self) -> None:
        """Let go of what was computed last."""
        self.given: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()

    def forwards(self) -> dict[nn.Module, Forward]:
        """The `forward` of each layer."""
        return {layer: self._forward(i) for i, layer in enumerate(self.layers)}

    def _forward(self, place: int) -> Forward:
        last = place == len(self.layers) - 1

        def forward(given: Tensor) -> Tensor:
            if self.given is not given:
                self.given, self.outputs = given, torch.split(linear(given, self.weight, self.bias), self.sizes, dim=-1)
            output = self.outputs[place]
            if last:
                self.forget()
            return output

        return forward


@contextmanager
def in_place_of(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """The modules go by these `forwards` for a while; afterwards nothing is left of it."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _not_compiled(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that are not part of a compiled one, where operations are joined anyway."""
    within: set[nn.Module] = set()
    for module in model.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            within.update(module.modules())
    return (module for module in model.modules() if module not in within)


def _rms_norm_form(module: nn.Module) -> tuple[float, bool] | None:
    """eps, and whether the weight is one less than what it multiplies by, if `module` is an RMSNorm; else None."""
    weights = dict(module.named_parameters())
    weight = weights.get("weight")
    if set(weights) != {"weight"} or weight is None or weight.dim() != 1 or weight.device.type == "meta":
        return None
    constants = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    if len(constants) != 1:
        return None
    [eps] = constants
    draw = torch.Generator().manual_seed(0)
    tried = torch.rand(len(weight), generator=draw).to(weight.device) + 0.5
    scales = torch.tensor([1e-3, 1.0, 30.0]).view(3, 1, 1)  # with the first one eps counts
    x = (torch.randn(3, 2, len(weight), generator=draw) * scales).to(weight.device)
    own = weight.data
    try:
        weight.data = tried
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            y = module(x)
            for plus_one in (False, True):
                expected = rms_norm(x, (len(weight),), tried + plus_one, eps)
                if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-4, atol=1e-6):
                    return eps, plus_one
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # it takes something else
    finally:
        weight.data = own
    return None


def _norm_forward(module: nn.Module, eps: float, plus_one: bool) -> Forward:
    def forward(x: Tensor) -> Tensor:
        own = module.get_parameter("weight")
        weight = 1 + own if plus_one else own
        # one kernel where both have the same format; the result has the wider one, as in the families
        y = rms_norm(x.to(weight.dtype) if weight.dtype == torch.float32 else x, weight.shape, weight, eps)
        return y.to(x.dtype) if plus_one else y  # those with 1 + w give back the format of their input

    return forward


class _RotaryTogether:
    """Takes the arguments of a family's `own` rotation, and gives its result in the format of autocast."""

    def __init__(self, own: Forward) -> None:
        self.own = own
        self.angles: tuple[Tensor, Tensor] | None = None  # of the last call; all layers have the same
        self.signed: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
        autocast = torch.is_autocast_enabled(q.device.type)
        plain = not args and options.get("unsqueeze_dim", 1) == 1 and q.dim() == 4 and q.shape[-1] == cos.shape[-1]
        if not autocast or not plain or cos.requires_grad or torch.compiler.is_compiling():
            return self.own(q, k, cos, sin, *args, **options)
        if self.angles is None or self.angles[0] is not cos or self.angles[1] is not sin:
            self.angles, self.signed = (cos, sin), _signed(cos, sin)
        assert self.signed is not None
        both = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], dim=2)  # (texts, length, heads of both, dim)
        turned = _rotated(both, *self.signed, torch.get_autocast_dtype(q.device.type))
        return tuple(part.transpose(1, 2) for part in torch.split(turned, [q.shape[1], k.shape[1]], dim=2))

    def is_own(self) -> bool:
        """Whether it is, on random input, what the family's own rotation gives."""
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (4, 2))
        angles = torch.rand(2, 5, 8, generator=draw) * 6
        cos, sin = angles.cos(), angles.sin()
        try:
            with torch.no_grad():
                own = self.own(q, k, cos, sin)
                both = torch.cat([q, k], dim=1).transpose(1, 2)
                turned = _rotated(both, *_signed(cos, sin), torch.float32).transpose(1, 2)
                return torch.allclose(torch.cat(own, dim=1), turned, rtol=1e-5, atol=1e-6)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False


def _signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos, s and roll(s), each (texts, length, 1, dim)."""
    half = sin.shape[-1] // 2
    s = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(2)
    return cos.unsqueeze(2), s, s.roll(half, dims=-1)


def _rotated(*arguments: Any) -> Tensor:
    """What `_Rotate` gives for its arguments."""
    turned: Tensor = _Rotate.apply(*arguments)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """y = x cos + roll(x) s, computed in the format of cos and written in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, s: Tensor, rolled: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, rolled)
        ctx.dtype = x.dtype
        return _turned(x, cos, s, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, rolled = ctx.saved_tensors
        return _turned(gradients[0], cos, rolled, ctx.dtype), None, None, None, None


def _turned(x: Tensor, cos: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), s, out=y)
