"""Several processes train one model: gradients averaged explicitly, parameters replicated or sharded per block (FSDP2).

Self-forcing runs the network many times per backward pass, which DistributedDataParallel's reducer does not expect; the
gradients of a step are averaged once, after its last micro-batch, in flat buckets. Without a process group every
function here does nothing, so one process needs no launcher.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

# Before there is a process group: functions of torch.distributed that are defined later keep it as a default argument.
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from sparse_forcing.processes import group_device, rank, world_size

BUCKET_ELEMENTS = 1 << 25


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Average of equally named numbers over processes."""
    if world_size() == 1 or not values:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=group_device())
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist()))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes; one that only other processes have counts as zero here.

    A parameter without a gradient anywhere keeps none, so that optimizers leave it alone, as they do with one process.
    Sharded parameters are left alone: FSDP averages theirs in the backward pass.
    """
    own = [x for x in parameters if x.requires_grad and not isinstance(x, DTensor)]
    if world_size() == 1 or not own:
        return
    used = torch.tensor([x.grad is not None for x in own], dtype=torch.uint8, device=group_device())
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    for parameter in (x for x, flag in zip(own, used.tolist()) if flag):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(x.numel() for x in bucket) >= BUCKET_ELEMENTS:
            _average(bucket)
            bucket = []
    if bucket:
        _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([x.flatten().float() for x in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(part.view_as(x))


def shard(model: nn.Module, *, reshard_after_forward: bool = True, param_dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2 over all processes, one unit per transformer block; sharded parameters are DTensors.

    Args:
        param_dtype: type of gathered parameters in computation (bfloat16); the shards keep theirs. Inputs keep theirs
            too, because a timestep of 937.5 is 936 in bfloat16: compute under autocast.
    """
    if not dist.is_initialized():
        return model
    # Blocks return views; nothing in this project writes to them in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(group_device().type, (world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.get_submodule("blocks").children():
        fully_shard(block, **options)
        register_fsdp_forward_method(block, "encode_text")
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "encode_text")
    return model


def shard_layers(model: nn.Module, *, param_dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2 of a frozen network whose layers lie in lists (a text encoder): one unit per layer of the outermost lists.

    The network must be called through its `forward`. Args: as in `shard`.
    """
    if not dist.is_initialized():
        return model
    mesh = init_device_mesh(group_device().type, (world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{other}.") for other in lists):
            for layer in model.get_submodule(name).children():
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def full_state(state: Any) -> Any:
    """A state dict with every sharded tensor whole again, on the first process's CPU; the others get None for a tensor.

    All processes must call it together. Tensors are gathered one by one, so that no more than one is ever whole on a
    device, and a node's host memory holds one copy of the state, not one for each of its processes.
    """
    if isinstance(state, Tensor):
        whole = state.full_tensor() if isinstance(state, DTensor) else state.detach()
        return whole.cpu() if rank() == 0 else None
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value) for value in state)
    return state


def shard_like(whole: Any, template: Tensor | None) -> Any:
    """Cut a whole tensor as `template` is cut; anything else comes back as it is."""
    if isinstance(template, DTensor) and isinstance(whole, Tensor) and whole.shape == template.shape:
        whole = whole.to(template.device)
        return distribute_tensor(whole, template.device_mesh, template.placements, src_data_rank=None)
    return whole
