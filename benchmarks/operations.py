"""Operations of one micro-batch on a GPU's code path, counted on a CPU: what the host has to launch.

A micro-batch of Stage I: 64 pairs, SmolLM2-135M's 30 layers, bf16 over fp32 weights, forward and backward; the
attention kernel, and PyTorch's RMSNorm, are one operation, as they are on a GPU. Counted are the leaf operations
(aten) that reach the device: views and allocations, which launch nothing, are left out. One operation on a list of
tensors (`_foreach_`) counts as one; it launches a kernel for some tens of them. All layers are alike, so two models are
counted, with one and with two layers. With `--compile` the decoder layers are compiled, and what is counted is
generated kernels and calls of external ones, the operations outside of the layers, and the sums of gradients that are
left to autograd.

    python benchmarks/operations.py [--before] [--compile]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch._inductor.utils import run_and_get_code

from anchorvec.model import attention, fused, packing
from anchorvec.model.head import HEAD_CHUNK_BYTES
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives import reconstruction
from anchorvec.objectives.reconstruction import TextReconstruction
from common import SHAPES, make_model
from launches import Count, one_kernel, one_norm
from stage_one import draw_pairs

BEFORE = "b98c275"


def on_gpu_path() -> None:
    """Have a CPU take the code path of a GPU."""
    attention.varlen_attn = one_kernel
    fused.rms_norm = one_norm
    reconstruction.head_chunk_bytes = lambda device: HEAD_CHUNK_BYTES["cuda"]
    attention._kernel_dtype = lambda query, value: torch.bfloat16
    packing.reads_no_mask = lambda device: True


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
    working = []  # made when the layers are compiled already, where they are

    def step() -> None:
        if not working:
            working.append(WorkingWeights(objective, fuse=True))
        with working[0].in_use(), torch.autocast("cpu", torch.bfloat16):
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


def compiled_calls(shape: str, pairs: int) -> Counter[str]:
    """Generated kernels, and calls of external ones, of one compiled layer: forward and backward pass, by kind."""
    step = prepared(shape, pairs, 1)
    step.compile_layers()  # type: ignore[attr-defined]
    _, sources = run_and_get_code(step)
    called = re.compile(r"^ *(?:\w+ = )?(cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.\w+\.\w+(?:\.\w+)?)\(", re.M)
    calls = [called.findall(source) for source in sources]
    return Counter(name for found in calls if any("text_by_text" in name for name in found) for name in found)


def accumulations(shape: str) -> int:
    """Sums of gradients that a compiled layer leaves to autograd: each of its weights is used in two passes."""
    model = make_model(shape, 0)
    joined = {layer for group in fused.shared_inputs(model) for layer in group[1:]}
    layer = model.model.layers[0]
    norms = sum(weight.dim() == 1 for weight in layer.parameters())  # whose gradients are added one by one
    return len(list(layer.parameters())) - len(joined & set(layer.modules())) + norms


def before(shape: str, pairs: int, layers: int) -> int:
    """Operations of the engine as it was at `BEFORE`."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "archive", BEFORE, "src", "benchmarks"]
        tree = subprocess.run(archive, cwd=here.parent, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=tree.stdout, check=True)
        for name in ("launches.py", "operations_before.py"):
            shutil.copy(here / name, Path(folder) / "benchmarks")
        command = [sys.executable, f"{folder}/benchmarks/operations_before.py", shape, str(pairs), str(layers)]
        environment = os.environ | {"PYTHONPATH": f"{folder}/src"}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    """Count."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", default="smollm2-135m")
    options.add_argument("--pairs", type=int, default=64)
    options.add_argument("--before", action="store_true", help=f"count what the engine at {BEFORE} does, too")
    options.add_argument("--compile", action="store_true", help="count what is left of compiled decoder layers")
    options.add_argument("--names", action="store_true", help="show the operations of a layer by name")
    chosen = options.parse_args()
    say = Console().print
    layers = SHAPES[chosen.shape]["num_hidden_layers"]

    def shown(what: str, one: int, two: int) -> None:
        say(f"{what}: {one + (layers - 1) * (two - one):,} ({2 * one - two:,}, and {two - one:,} for a layer)")

    if chosen.before:
        shown(f"at {BEFORE}", *(before(chosen.shape, chosen.pairs, n) for n in (1, 2)))
    on_gpu_path()
    one, two = (counted(chosen.shape, chosen.pairs, n) for n in (1, 2))
    if chosen.names:
        say(json.dumps((two - one).most_common()))
    shown("operations", one.total(), two.total())
    if chosen.compile:
        outside = 2 * one.total() - two.total()
        layer, sums = compiled_calls(chosen.shape, min(chosen.pairs, 4)), accumulations(chosen.shape)
        if chosen.names:
            say(json.dumps(layer.most_common()))
        say(
            f"compiled: {outside + layers * (2 * layer.total() + sums):,} ({outside:,} outside of the layers, "
            f"{layer.total()} for a layer and pass, {sums} sums of gradients for a layer)"
        )


if __name__ == "__main__":
    main()
