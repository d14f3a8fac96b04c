"""The count of `operations.py` for the engine as it was at b98c275, whose tree stands first in PYTHONPATH.

`python benchmarks/operations.py --before` runs it.
"""

import argparse
import sys
from typing import Any

import torch
from anchorvec.packing import PACKED_ATTENTION
from anchorvec.reconstruction import Reconstruction
from torch import Tensor
from transformers import AttentionInterface

from common import make_model
from launches import Count, one_kernel
from stage_one import draw_pairs


def on_a_gpu(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What that engine's attention does on a GPU, its kernel as one operation."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    q, k, v = (part[0].transpose(0, 1).to(torch.bfloat16).contiguous() for part in (query, key, value))
    return one_kernel(q, k, v, cu_seq_lens_q, scale=scaling)[None].to(value.dtype), None


def main() -> None:
    """Write the number of operations, with so many layers and pairs."""
    options = argparse.ArgumentParser()
    options.add_argument("shape")
    options.add_argument("pairs", type=int)
    options.add_argument("layers", type=int)
    chosen = options.parse_args()
    AttentionInterface.register(PACKED_ATTENTION, on_a_gpu)
    model = make_model(chosen.shape, 0)
    del model.model.layers[chosen.layers :]
    model.config.num_hidden_layers = chosen.layers
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = draw_pairs(chosen.pairs, 0, model.config.vocab_size)
    objective = Reconstruction(model)
    objective.packed = True

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch).loss
        loss.backward()

    step()
    with Count() as count:
        step()
    sys.stdout.write(f"{sum(count.names.values())}\n")


if __name__ == "__main__":
    main()
