"""What the processes of a run agree on while it trains; with one process nothing is exchanged."""

import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from anchorvec.device import default_device
from anchorvec.ranks import rank, ranks

PATIENCE = timedelta(hours=6)
"""For another process to come to the same place; a checkpoint is written within it."""


def join() -> None:
    """Have this process take its device, and meet the others; nothing where it is alone."""
    if ranks() > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # what is to replace it is not there yet
        PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)


def gathered(numbers: Sequence[int]) -> list[list[int]]:
    """The `numbers` of each process, which all have as many: (processes, numbers). They are integers of 64 bits."""
    if ranks() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64, device=default_device())
    parts = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(parts, own)
    return torch.stack(parts).tolist()


def any_of(*flags: bool) -> list[bool]:
    """For each of `flags`, whether it is set in any process."""
    return [any(column) for column in zip(*gathered(flags), strict=True)]


def from_first(number: float) -> float:
    """The `number` of the first process."""
    if ranks() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=default_device())
    dist.broadcast(tensor, src=0)
    return float(tensor)


def added(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Sequence[Tensor]:
    """The `tensor` of each process, which all have the same shape; a gradient of them flows back to their process."""
    parts: Sequence[Tensor] = _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
    return parts


class _AllGather(torch.autograd.Function):
    """torch has its own in private modules alone."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(tensor) for _ in range(ranks())]
        dist.all_gather(parts, tensor.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return added(torch.stack(gradients))[rank()]


def wait_for_all() -> None:
    """Come back when every process is here."""
    if ranks() > 1:
        dist.barrier()
