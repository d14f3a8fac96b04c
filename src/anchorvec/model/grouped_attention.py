"""Attention over packed texts on a CPU: texts of like length together, in a few batched products.

Text by text the kernels of PyTorch are called hundreds of times a step, for sizes at which they are slow, the backward
pass in bf16 above all. Here the texts of like length are rows of one batch, padded on the right, where a causal text
sees nothing, and one that is read in both directions has a mask. Probabilities are computed in fp32 and again in the
backward pass, so that no more is kept for it than query, key and value.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUPED_TOKENS = 128
"""Of a text, at most: all pairs of positions are computed, those that are not seen too."""

_PADDED = 1.5
"""Positions of a group, at most, for each of its tokens."""

_MULTIPLE = 16
"""Positions of a row: products of odd sizes are slower."""


def attend_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention within each of the packed texts, (1, tokens, heads, dim), differentiable.

    `query` is (1, heads, tokens, dim), `key` and `value` are like it, with as many heads or fewer; the texts have
    `lengths` tokens. `scaling` multiplies the products of query and key (default: dim ** -0.5); a position sees
    those before it, or, if it is not `causal`, all; with a `window`, so many positions, itself included, or so many to
    each side and itself. Under autocast it computes in autocast's format.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    q, k, v = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))  # (tokens, heads, dim)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Attention.apply(q, k, v, tuple(lengths), scale, window, causal)  # type: ignore[no-untyped-call]
    return out[None]


@dataclass(frozen=True)
class _Group:
    """Texts of like length as rows of one batch, each head of each text a row of its own."""

    query: Tensor  # (rows * length,): the (token, head) that stands at each position
    key: Tensor  # the same of the key's head that a query's head looks at
    absent: Tensor | None  # (rows, length, 1): the positions without a token, if there are any
    bias: Tensor  # (length, length), or one for each row or for all positions of a row, fp32: -inf what is not seen

    def of(self, places: Tensor, tokens: Tensor) -> Tensor:
        """The `tokens` (tokens, their heads, dim) at `places`: (rows, length, dim)."""
        dim = tokens.shape[-1]
        return tokens.reshape(-1, dim).index_select(0, places).view(-1, self.bias.shape[-1], dim)

    def probabilities(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Which keys `k` the queries `q` see, both (rows, length, dim): (rows, length, length), computed in fp32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        products = torch.baddbmm(self.bias.to(wide), q.to(wide), k.to(wide).transpose(1, 2), alpha=scale)
        return products.softmax(-1).to(q.dtype)


@dataclass(frozen=True)
class _Plan:
    """The groups of a row of texts, and where each (token, head) lies in what they give one after another."""

    tokens: int
    groups: tuple[_Group, ...]
    query: Tensor  # (tokens * heads,)
    key: Tensor  # (tokens * heads of the key,), heads that look at it added up

    def back(self, places: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """What the groups have in `parts`, each (rows, length, dim), by tokens: (tokens, heads, dim)."""
        dim = parts[0].shape[-1]
        rows = torch.cat([part.reshape(-1, dim) for part in parts]).index_select(0, places)
        return rows.view(self.tokens, -1, dim)


@lru_cache(maxsize=64)
def _plan(lengths: tuple[int, ...], heads: int, shared: int, window: int | None, causal: bool) -> _Plan:
    """How texts of these `lengths` are put together; all layers of a pass ask for the same.

    `shared` are the heads of key and value, each looked at by `heads // shared` heads.
    """
    starts = [0, *itertools.accumulate(lengths)]
    groups: list[_Group] = []
    begin, width_of = (torch.empty(starts[-1], dtype=torch.long) for _ in range(2))  # of each token's text
    before = 0
    for texts, width in _like_length(lengths):
        token = torch.zeros(len(texts), 1, width, dtype=torch.long)
        absent = torch.ones(len(texts), 1, width, dtype=torch.bool)
        for row, text in enumerate(texts):
            token[row, 0, : lengths[text]] = torch.arange(starts[text], starts[text + 1])
            absent[row, 0, : lengths[text]] = False
            begin[starts[text] : starts[text + 1]] = before + row * width
            width_of[starts[text] : starts[text + 1]] = width
        head = torch.arange(heads)[:, None]
        groups.append(
            _Group(
                query=(token * heads + head).flatten(),
                key=(token * shared + head // (heads // shared)).flatten(),
                absent=absent.expand(-1, heads, -1).reshape(-1, width, 1) if absent.any() else None,
                bias=_bias(absent.expand(-1, heads, -1).reshape(-1, width), window, causal),
            )
        )
        before += len(texts) * width
    offset = torch.cat([torch.arange(length) for length in lengths])

    def places(n: int) -> Tensor:
        return (begin[:, None] * n + width_of[:, None] * torch.arange(n) + offset[:, None]).flatten()

    return _Plan(starts[-1], tuple(groups), places(heads), places(shared))


def _bias(absent: Tensor, window: int | None, causal: bool) -> Tensor:
    """0 where a position is seen and -inf elsewhere, for rows with `absent` positions (rows, length) at their end.

    What stands at these is not read, whatever they see; but they must see something.
    """
    width = absent.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool)
    if causal:
        seen = seen.tril() if window is None else seen.tril().triu(1 - window)
    else:
        seen = seen if window is None else seen.tril(window).triu(-window)
        if absent.any() and window is None:
            seen = ~absent[:, None]  # (rows, 1, length)
        elif absent.any():
            seen = (seen & ~absent[:, None]) | absent[:, :, None]  # (rows, length, length)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _like_length(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """The texts in groups of which little is padding, long ones first, each with the positions of its rows."""
    groups: list[tuple[list[int], int]] = []
    held = 0
    for text in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and (len(groups[-1][0]) + 1) * groups[-1][1] <= _PADDED * (held + lengths[text]):
            groups[-1][0].append(text)
        else:
            groups.append(([text], -(-lengths[text] // _MULTIPLE) * _MULTIPLE))
            held = 0
        held += lengths[text]
    return groups


class _Attention(torch.autograd.Function):
    """Of query, key and value, (tokens, heads, dim) each, the attention within each text."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        ctx.plan = plan = _plan(lengths, q.shape[1], k.shape[1], window, causal)
        parts = []
        for group in plan.groups:
            Q, K, V = group.of(group.query, q), group.of(group.key, k), group.of(group.key, v)
            parts.append(group.probabilities(Q, K, scale) @ V)
        return plan.back(plan.query, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        plan, repeats = ctx.plan, q.shape[1] // k.shape[1]
        dQs, dKs, dVs = [], [], []
        for group in plan.groups:
            Q, K, V = group.of(group.query, q), group.of(group.key, k), group.of(group.key, v)
            dO = group.of(group.query, gradients[0])
            if group.absent is not None:
                dO.masked_fill_(group.absent, 0)
            P = group.probabilities(Q, K, ctx.scale)
            dP = dO @ V.transpose(1, 2)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype).mul_(ctx.scale)
            dQs.append(dS @ K)
            dKs.append((dS.transpose(1, 2) @ Q).unflatten(0, (-1, repeats)).sum(1))
            dVs.append((P.transpose(1, 2) @ dO).unflatten(0, (-1, repeats)).sum(1))
        return plan.back(plan.query, dQs), plan.back(plan.key, dKs), plan.back(plan.key, dVs), None, None, None, None
