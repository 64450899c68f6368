"""The Triton backend of block-sparse attention: what `interface` calls, and where the launch plans are run."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.gpu.launch import (
    MAX_BLOCK,
    MAX_HEAD_DIM,
    Launch,
    Problem,
    plan_backward,
    plan_forward,
)
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape

INTERPRETED = triton.knobs.runtime.interpret  # read once: Triton itself decides at import
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_unavailable(query: Tensor) -> str | None:
    """Reason why the kernels cannot run on this tensor, or None."""
    if query.dtype not in _DTYPES:
        return f"no kernel for {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-2] > MAX_BLOCK:
        return f"blocks of {query.shape[-2]} rows x {query.shape[-1]} are larger than {MAX_BLOCK} x {MAX_HEAD_DIM}"
    if INTERPRETED:
        return None if query.device.type == "cpu" else "Triton interprets (TRITON_INTERPRET is set): use CPU tensors"
    if query.device.type != "cuda":
        return f"the tensor is on {query.device}; Triton needs a CUDA or ROCm GPU"
    if (name := target(query.device)).startswith("sm_") and int(name.removeprefix("sm_")) < 80:
        return "the GPU is older than compute capability 8.0"
    return None


def target(device: torch.device) -> str:
    """Architecture name in the launch table: "sm_90", "gfx942", ...; the interpreter plays the plainest one."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    return _target_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _target_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def forward(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
    num_persistent: int,
    return_mass: bool,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.py; lse and mass are float32."""
    M = block_index.shape[-1]
    if query.numel() == 0 or M == 0 or key_pool.shape[2] == 0:
        empty = query.new_zeros((*block_index.shape[:-1], M if return_mass else 0), dtype=torch.float32)
        nothing = query.new_zeros(rest_shape(query, keep_rest))
        return torch.zeros_like(query).contiguous(), _no_keys(query), empty, nothing
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale)
    plan = plan_forward(problem, return_mass=return_mass, keep_rest=keep_rest)
    run(plan.launches, query.device)
    return plan.out, plan.lse, plan.mass, plan.out_rest


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_rest: Tensor,
    scale: float,
    num_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_pool and value_pool, contiguous, in their type; bitwise the same on every run."""
    if query.numel() == 0 or block_index.shape[-1] == 0 or key_pool.shape[2] == 0:
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key_pool, value_pool)]
        return zeros[0], zeros[1], zeros[2]
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale)
    plan = plan_backward(problem, grad_out, grad_lse, out, out_rest, lse)
    run(plan.launches, query.device)
    return plan.grad_query, plan.grad_key, plan.grad_value


def run(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of `device`; descriptors made in a kernel need scratch memory."""
    triton.set_allocator(_scratch)  # every time: the setting belongs to a thread, and autograd has its own
    with active(device):
        for launch in launches:
            launch.run()


def active(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes it `device`, where it is not already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # of the current device


def _problem(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
) -> Problem:
    return Problem(
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_index=block_index.contiguous(),
        query_sizes=None if query_sizes is None else query_sizes.contiguous(),
        key_sizes=None if key_sizes is None else key_sizes.contiguous(),
        scale=scale,
        arch=target(query.device),
    )


def _no_keys(query: Tensor) -> Tensor:
    return torch.full(query.shape[:-1], float("-inf"), dtype=torch.float32, device=query.device)
