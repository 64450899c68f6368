"""The Triton backend of block-sparse attention: what `interface` calls, and where the launch plans are run."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.gpu.launch import (
    MAX_BLOCK,
    MAX_HEAD_DIM,
    plan_backward,
    plan_forward,
)
from sparse_forcing.kernels.block_sparse_attention.problem import Problem
from sparse_forcing.kernels.triton_runtime import Launch, active, target, why_unfit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_unavailable(query: Tensor) -> str | None:
    """Reason why the kernels cannot run on this tensor, or None."""
    if query.dtype not in _DTYPES:
        return f"no kernel for {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-2] > MAX_BLOCK:
        return f"blocks of {query.shape[-2]} rows x {query.shape[-1]} are larger than {MAX_BLOCK} x {MAX_HEAD_DIM}"
    return why_unfit(query.device)


def forward(problem: Problem, return_mass: bool, keep_rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.py; lse and mass are float32."""
    plan = plan_forward(_dense(problem), target(problem.query.device), return_mass=return_mass, keep_rest=keep_rest)
    run(plan.launches, problem.query.device)
    return plan.out, plan.lse, plan.mass, plan.out_rest


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, out_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_pool and value_pool, contiguous, in their type; bitwise the same on every run."""
    device = problem.query.device
    plan = plan_backward(_dense(problem), target(device), grad_out, grad_lse, out, out_rest, lse)
    run(plan.launches, device)
    return plan.grad_query, plan.grad_key, plan.grad_value


def run(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of `device`; descriptors made in a kernel need scratch memory."""
    triton.set_allocator(_scratch)  # every time: the setting belongs to a thread, and autograd has its own
    with active(device):
        for launch in launches:
            launch.run()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # of the current device


def _dense(problem: Problem) -> Problem:
    """The same with contiguous tables, whose strides the kernels do not take."""
    query_sizes, key_sizes = (None if x is None else x.contiguous() for x in (problem.query_sizes, problem.key_sizes))
    return problem._replace(block_index=problem.block_index.contiguous(), query_sizes=query_sizes, key_sizes=key_sizes)
