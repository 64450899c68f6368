"""The custom op behind block_sparse_attention: torch.compile, FakeTensor and checkpointing see one op with a gradient.

A backend is a module with three functions, on a problem.py `Problem` that has been checked and is not empty:

    why_unavailable(query) -> str | None           the reason it cannot run on this tensor's device and dtype
    forward(problem, return_mass, keep_rest) -> (out in query's dtype, lse, mass, out_rest)
        lse and mass in `accumulation_dtype`, mass [B, H, Nq, 0] if not asked for; out_rest: see `rest_shape`
    backward(problem, grad_out, grad_lse or None, out, lse, out_rest) -> (grad_query, grad_key_pool, grad_value_pool),
        contiguous, inputs' dtype

Only here a problem is flattened into the arguments that an op takes. The reference has no backward: autograd
differentiates it. It is also the gradient of the backward op, whatever the backend, so second gradients are right, and
so are those beyond. Empty problems are answered here.

Registered through torch.library.Library rather than custom_op, whose first call imports the compiler (a second).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention import reference
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

BACKEND_MODULES = {"triton": "gpu.backend", "cpu": "cpu.backend", "reference": "reference"}


def backend_module(name: str) -> ModuleType:
    """Import a backend on first use: Triton is neither cheap to import nor always there."""
    return importlib.import_module(f"sparse_forcing.kernels.block_sparse_attention.{BACKEND_MODULES[name]}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of lse and mass: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def rest_shape(query: Tensor, keep_rest: bool) -> tuple[int, ...]:
    """Shape of out_rest, of query's dtype: what rounding took from out, kept for the backward of 16-bit types.

    The gradient of a score is p (dp - <dout, out>), a small difference where probabilities are near 0 or 1. The
    rounding of out to 16 bits would be its largest error by far; out + out_rest has twice the digits.
    """
    return tuple(query.shape) if keep_rest and query.element_size() == 2 else (0,)


_PROBLEM = (
    "Tensor query, Tensor key_pool, Tensor value_pool, Tensor block_index, Tensor? query_sizes, Tensor? key_sizes, "
    "float scale, int num_persistent"
)
_FIELDS = len(Problem._fields)
_NAME = "block_sparse_attention"
_LIBRARY = torch.library.Library("sparse_forcing", "FRAGMENT")
_LIBRARY.define(
    f"{_NAME}({_PROBLEM}, bool return_mass, bool keep_rest, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"{_NAME}_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor out_rest, {_PROBLEM}, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
forward_op = torch.ops.sparse_forcing.block_sparse_attention.default
backward_op = torch.ops.sparse_forcing.block_sparse_attention_backward.default


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, (return_mass, keep_rest, backend) = Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if problem.empty:
        out, lse, mass, rest = _fake_forward(*arguments)
        return out.zero_(), lse.fill_(float("-inf")), mass.zero_(), rest.zero_()
    return backend_module(backend).forward(problem, return_mass, keep_rest)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (grad_out, grad_lse, out, lse, out_rest), problem = arguments[:5], Problem(*arguments[5:-1])
    if problem.empty:
        dq, dk, dv = (grad.zero_() for grad in _fake_backward(*arguments))
        return dq, dk, dv
    return backend_module(arguments[-1]).backward(problem, grad_out, grad_lse, out, lse, out_rest)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, (return_mass, keep_rest, _) = Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    query, (B, H, Nq, M) = problem.query, problem.block_index.shape
    dtype = accumulation_dtype(query.dtype)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    mass = query.new_empty((B, H, Nq, M if return_mass else 0), dtype=dtype)
    return out, lse, mass, query.new_empty(rest_shape(query, keep_rest))


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(*arguments[5:-1])
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem.inputs)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.num_persistent, _, _, ctx.backend = inputs
    out, lse, mass, out_rest = output
    ctx.save_for_backward(*tensors, out, lse, out_rest)
    ctx.mark_non_differentiable(mass, out_rest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple:
    *tensors, out, lse, out_rest = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return (None,) * (_FIELDS + 3)
        grad_out = torch.zeros_like(out)
    problem = Problem._make((*tensors, ctx.scale, ctx.num_persistent))
    grads = backward_op(grad_out, grad_lse, out, lse, out_rest, *problem, ctx.backend)
    return (*grads, *(None,) * _FIELDS)


def _save_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad_out, grad_lse, _, _, _, *tensors, ctx.scale, ctx.num_persistent, _ = inputs
    ctx.save_for_backward(grad_out, grad_lse, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate_again(ctx: Any, *upstream: Tensor | None) -> tuple:
    """The whole gradient goes to the problem's inputs: out and lse are functions of them, not inputs of their own."""
    grad_out, grad_lse, *tensors = ctx.saved_tensors
    problem = Problem._make((*tensors, ctx.scale, ctx.num_persistent))
    dgrad_out, dgrad_lse, *inputs = reference.second_gradients(problem, grad_out, grad_lse, upstream)
    return (dgrad_out, dgrad_lse, None, None, None, *inputs, *(None,) * (_FIELDS - 2))


_LIBRARY.impl(_NAME, _forward, "CompositeExplicitAutograd")
_LIBRARY.impl(f"{_NAME}_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(forward_op, _fake_forward, lib=_LIBRARY)
torch.library.register_fake(backward_op, _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(forward_op, _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(backward_op, _differentiate_again, setup_context=_save_backward, lib=_LIBRARY)
