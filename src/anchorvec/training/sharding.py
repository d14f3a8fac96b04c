"""Weights, gradients and optimizer state shared out among the devices of a run (FSDP2), so that none holds them all.

Each device keeps its part of the fp32 weights, of their gradients and of AdamW's moments: 16 bytes a parameter, divided
by the devices. For each pass a layer's weights are gathered, in bf16 where the stage computes in it, and let go again;
the token embeddings, the LM head and the final norm stay gathered, in fp32, from the forward pass to the backward pass.
What is written is whole: the same files as with one device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from anchorvec.errors import AnchorvecError
from anchorvec.model.compiling import decoder_layers
from anchorvec.ranks import rank, ranks


def shard(objective: nn.Module, model: PreTrainedModel, *, bf16: bool) -> None:
    """Share out the weights of `objective`, which trains `model`, among all processes, layer by layer.

    With `bf16` layers compute on weights in bf16, gathered so; gradients are added up in fp32. Raises AnchorvecError
    as `layers_to_share`.
    """
    layers = layers_to_share(model)
    mesh = init_device_mesh(model.device.type, (ranks(),))
    # hidden states stay as they are, in fp32 from layer to layer, as with one device
    as_one = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else as_one
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=of_layers)
    fully_shard(objective, mesh=mesh, mp_policy=as_one)
    marked: Any = objective
    marked._is_accelerate_prepared = True  # or else it would copy what is shared out to all (DDP)


def layers_to_share(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `model`. Raises AnchorvecError for a family whose layers cannot be told."""
    layers = decoder_layers(model)
    if not layers:
        raise AnchorvecError(
            f"stage_one.sharded: {type(model).__name__} has no layers that can be shared out; set it to false"
        )
    return layers


def is_sharded(model: object) -> bool:
    """Whether the weights of `model` are shared out."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, of which a process may have a part: then all processes must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def for_first(value: Any) -> Any:
    """All of `value`, a tensor, in the CPU's memory for the first process, and nothing of it for others; all must ask.

    A tensor that is not shared out, and anything else, is given back as it is.
    """
    if not isinstance(value, DTensor):
        return value
    full = whole(value)
    return full.cpu() if rank() == 0 else full.new_empty(0)


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """The `state` of an optimizer as it would be with one device, for the first process; as `for_first`."""
    found: dict[str, Any] = tree_map(for_first, state)
    return found


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of `tensor`, which every process has whole, that this process has of `like`; all, where it has all."""
    if not isinstance(like, DTensor):
        return tensor
    device = like.device_mesh.device_type
    return distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)


def shared_out_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_state`, which gave `state`, for this process's parts of the weights of `optimizer`."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {
            name: shared_out(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value
            for name, value in state["state"][number].items()
        }
        for number, weight in zip(numbers, weights, strict=True)
        if number in state["state"]
    }
    return {**state, "state": moments}


def copy_whole(sharded: nn.Module, plain: nn.Module | None) -> None:
    """Copy all weights of `sharded` into `plain`, the same model in one process; None in the others, which take part.

    They go through the memory one by one.
    """
    target = dict(plain.named_parameters()) if plain is not None else {}
    for name, weight in sharded.named_parameters():
        full = for_first(weight.detach())
        if target:
            with torch.no_grad():
                target[name].copy_(full)
