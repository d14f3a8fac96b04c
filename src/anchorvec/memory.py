"""How many tokens fit at a time: from the memory that is free, and what the model keeps for a token."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

ADAM_BYTES = 12
"""For a trained parameter: its gradient and the two moments of AdamW, in fp32."""

_SHARE_OF_FREE = 0.6
"""The rest is for buffers of the backward pass, logits, gaps in the heap, and other programs."""

_CGROUP = Path("/sys/fs/cgroup")


def tokens_that_fit(bytes_per_token: float, trained_parameters: int, device: torch.device) -> int:
    """Tokens whose activations may be held on `device` at one time, beside what training the parameters takes.

    0 if not even that fits.
    """
    free = free_memory(device) - ADAM_BYTES * trained_parameters
    return max(0, int(_SHARE_OF_FREE * free / bytes_per_token))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`; on a CPU, within the limit of its container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterator[int]:
    """What the memory limits of this container (cgroup v2, v1) leave, in bytes; nothing where there are none."""
    for limit, used in [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ]:
        try:
            most, now = (_CGROUP / limit).read_text().strip(), int((_CGROUP / used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            yield max(0, int(most) - now)


def bytes_per_token(forward: Callable[[int], tuple[Tensor, int]]) -> float:
    """Bytes that autograd keeps for each token until the backward pass.

    `forward(n)` runs n equal texts and gives an output and the number of their tokens. Two sizes are compared, so
    what does not grow with the tokens (weights, their bf16 copies) is not counted.
    """
    (small, few), (large, many) = (_kept_bytes(forward, n) for n in (1, 3))
    return (large - small) / (many - few)


def _kept_bytes(forward: Callable[[int], tuple[Tensor, int]], n: int) -> tuple[int, int]:
    """Bytes that autograd keeps for the output of `forward(n)`, and the tokens of it."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, tokens = forward(n)
    kept = sum(storages.values())
    del output  # the graph kept all storages alive until here, so that no address was counted twice
    return kept, tokens
