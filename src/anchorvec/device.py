"""The device, and which number format it multiplies fastest."""

import platform
import re
import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from anchorvec.errors import AnchorvecError
from anchorvec.ranks import ranks, ranks_here

_PACE_SECONDS = 0.25

Precision = Literal["bf16", "fp32"]


def resolve_precision(setting: Literal["auto", "bf16", "fp32"]) -> Precision:
    """`setting`, or for `auto` bf16 autocast where the device multiplies bf16 well, else fp32.

    Master weights are fp32 either way (T9). On a CPU `auto` is measured: bf16 is several times faster than fp32 on
    processors with bf16 matrix units and several times slower on those without.
    """
    return _fastest() if setting == "auto" else setting


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def keep_frozen_in_bf16(model: nn.Module) -> None:
    """Keep what is frozen of the linear layers in bf16: half the memory, and autocast need not convert it in each pass.

    Under autocast to bf16 the results are the same, bit for bit. `model` has no LM head: one that is tied to the token
    embeddings would convert these.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(part.requires_grad for part in module.parameters()):
            module.to(torch.bfloat16)


def devices_named(text: str | int, *, ray: bool = False) -> list[str]:
    """The devices of `text`: so many of them, or their names, split by commas (`cuda:0,cuda:1`; `cpu,cpu`).

    With `ray` they are workers of a cluster, which are counted alone. Raises AnchorvecError for a device that this
    machine does not have.
    """
    if ray and not re.fullmatch(r"\s*[1-9][0-9]*\s*", str(text)):
        raise AnchorvecError(f"--devices: {text!r} is no number of workers for --ray; write, for example, 2")
    if ray:
        return ["cluster"] * int(text)
    default, here = default_device().type, torch.accelerator.device_count()
    if re.fullmatch(r"\s*[0-9]+\s*", str(text)):
        count = int(text)
        names = ["cpu"] * count if default == "cpu" else [f"{default}:{i}" for i in range(count)]
    else:
        names = [name.strip() for name in str(text).split(",")]
    known = ["cpu", *(f"{default}:{i}" for i in range(here))]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise AnchorvecError(
            f"--devices: {text!r} names no device of this machine ({', '.join(unknown)}); it has {', '.join(known)}"
        )
    return names


def devices_of_run() -> list[str]:
    """The devices of this machine that the processes of the run have, where it has several; else none are named."""
    kind, here = default_device().type, ranks_here()
    if here == 1:
        return []
    return [kind if kind == "cpu" else f"{kind}:{i}" for i in range(here)]


def check_one_device() -> None:
    """Raise AnchorvecError where one process would train on several devices, and where one of several would alone."""
    if ranks() > 1:
        raise AnchorvecError("this is for one process; start it without torchrun and accelerate launch")
    check_a_process_each()


def check_a_process_each() -> None:
    """Raise AnchorvecError where this process is alone and sees several devices."""
    if ranks() == 1 and (count := torch.cuda.device_count()) > 1:
        raise AnchorvecError(
            f"there are {count} devices, and a process trains on one: start with torchrun --nproc-per-node {count} -m "
            "anchorvec train ..., or show one, with CUDA_VISIBLE_DEVICES=0"
        )


def device_name() -> str:
    """What the maker calls the device: of a CPU, its model where the system tells (Linux), else its architecture."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def pace() -> float:
    """Seconds that a fixed piece of arithmetic takes on the CPU now, over a quarter of a second.

    It grows where other programs take a part of the processor. On another device, which they do not slow down, 1.
    """
    if default_device().type != "cpu":
        return 1.0
    a, b = torch.ones(256, 576), torch.ones(1536, 576)
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < _PACE_SECONDS:
        torch.nn.functional.linear(a, b)
        times += 1
    return (time.perf_counter() - start) / times


@cache
def _fastest() -> Precision:
    device = default_device()
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if _matmul_seconds(torch.bfloat16) < 0.7 * _matmul_seconds(torch.float32) else "fp32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times)
