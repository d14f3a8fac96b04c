"""How many tokens fit at a time: from the memory that is free, and what the model keeps for a token."""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from anchorvec.ranks import ranks_here

ADAM_BYTES = 12
"""For a trained parameter: its gradient and the two moments of AdamW, in fp32."""

_SHARE_OF_FREE = {"cpu": 0.5, "cuda": 0.8}
"""The rest is for gaps in the heap, which took 0.8 times as much again on a CPU, and for other programs."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

_CGROUP, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def tokens_that_fit(per_token: float, fixed: float, device: torch.device, free: float | None = None) -> int:
    """Tokens whose activations, of `per_token` bytes each, may be held on `device` beside `fixed` bytes; 0 if none.

    `free`: the bytes that are free on it; None: on this machine, now.
    """
    share = _SHARE_OF_FREE.get(device.type, _SHARE_OF_FREE["cpu"])
    return max(0, int(share * ((free_memory(device) if free is None else free) - fixed) / per_token))


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for this process, where it is glibc.

    It would give large blocks back to the system at once, and each page of the next one costs a fault: 820,000 in a
    step of Stage I of SmolLM2-135M, an eighth of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Give back to the system what finished work has left: unreachable cycles, such as a trainer, and free heap."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`.

    On a CPU, within the limit of its container, and with the other processes of the run as hungry.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([psutil.virtual_memory().available, *_cgroup_rooms()]) // ranks_here()


def _cgroup_rooms() -> Iterator[int]:
    """What the memory limits on this process (cgroup v2, v1) leave, in bytes; nothing where there are none."""
    for folder in _cgroup_folders():
        for limit, used, cache in [
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ]:
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most.isdigit():
                # Files that were read stay in memory until it is wanted; they count as used.
                yield max(0, int(most) - now + int(counts.get(cache, 0)))


def _cgroup_folders() -> Iterator[Path]:
    """The control groups that this process belongs to, with all that contain them; a batch system limits a job's."""
    yield from (_CGROUP, _CGROUP / "memory")  # all that a container sees
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path(path.lstrip("/"))
            yield from (_CGROUP / controllers / part for part in (group, *group.parents))


def kept_bytes(model: nn.Module, forward: Callable[[int], tuple[Tensor, int]], longest: int = 0) -> tuple[float, float]:
    """Bytes that autograd keeps until the backward pass: for each token, and whatever their number.

    `forward(n)` runs a text of n parts through `model` and gives an output and the number of its tokens. Some kinds of
    attention keep matrices, of the length squared: the first figure is that for a text of `longest` tokens. What does
    not grow with the tokens are copies of weights in bf16; the weights themselves do not count.
    """
    (k1, t1), (k2, t2), (k3, t3) = (_kept(model, forward, n) for n in (1, 2, 3))
    slopes = (k2 - k1) / (t2 - t1), (k3 - k2) / (t3 - t2)
    squared = max(0.0, (slopes[1] - slopes[0]) / (t3 - t1))
    linear = slopes[0] - squared * (t1 + t2)
    return linear + squared * longest, k1 - linear * t1 - squared * t1**2


def _kept(model: nn.Module, forward: Callable[[int], tuple[Tensor, int]], n: int) -> tuple[int, int]:
    """Bytes that autograd keeps for the output of `forward(n)`, and the tokens of it."""
    # Told apart by the storages' own addresses: a model without weights has no data.
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep the graph that keeps it, for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, tokens = forward(n)
    kept = sum(storages.values())
    del output  # the graph kept all storages alive until here, so that no address was counted twice
    return kept, tokens
