"""Entry point of persistent block-sparse attention: checks and backend choice.

Every query block lists the pool slots it attends to; one softmax runs over the tokens of the listed slots:

    out[i] = sum_j softmax_j(scale * <q_i, k_j>) v_j,      lse[i] = log sum_j exp(scale * <q_i, k_j>)

Shape legend: problem.py.

The reference is plain torch that autograd already understands, so it is called directly; the other backends sit behind
one custom op (ops.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_sparse_attention import reference
from sparse_forcing.kernels.block_sparse_attention.cpu import small
from sparse_forcing.kernels.block_sparse_attention.ops import (
    BACKEND_MODULES,
    backend_module,
    backward_op,
    forward_op,
    rest_shape,
)
from sparse_forcing.kernels.block_sparse_attention.problem import (
    OPERATION,
    Problem,
    check_outcome,
    check_shapes,
    check_values,
)
from sparse_forcing.kernels.values import checked_values, require_scale, require_tensors

__all__ = [
    "BACKENDS",
    "BlockSparseOutput",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "checked_values",
    "full_lists_attention",
    "resolve_backend",
    "why_unavailable",
]
BACKENDS = ("auto", *BACKEND_MODULES)
"""Names that `backend` takes; "auto" chooses by the device of the tensors."""


class BlockSparseOutput(NamedTuple):
    """Attention out [B, H, Nq, Tq, D] in query's dtype, lse [B, H, Nq, Tq], natural log, mass [B, H, Nq, M] or None."""

    out: Tensor
    lse: Tensor
    mass: Tensor | None


def block_sparse_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    *,
    query_sizes: Tensor | None = None,
    key_sizes: Tensor | None = None,
    scale: float | None = None,
    num_persistent: int = 0,
    return_mass: bool = False,
    backend: str = "auto",
) -> BlockSparseOutput:
    """Attention of each query block over the pool slots it lists (Sparse Forcing, arXiv 2604.21221, section 3).

    Args:
        query: [B, H, Nq, Tq, D], padded rows allowed.
        key_pool, value_pool: [B, H, S, T, D]; B or H may be 1 and is then broadcast.
        block_index: [B, H, Nq, M] slots, int32 (or other integers), -1 only at the end of a row; rows may be empty.
            A slot that is listed twice counts twice.
        query_sizes: [Nq] int32, real rows of each query block; None means Tq everywhere.
        key_sizes: [B, H, S] int32, real tokens of each slot; None means T everywhere.
        scale: positive factor on the scores; None means 1 / sqrt(D).
        num_persistent: promise that the first so many entries of every row of one (batch, head) are the same slots.
            A hint for speed.
        return_mass: also return the attention probability of each listed block, summed over real query rows, detached.
        backend: "auto" (triton on a GPU, cpu on the CPU, else reference) or one of them by name.

    Returns:
        BlockSparseOutput. Padded and empty rows give out 0 and lse -inf. Differentiable in query, key_pool and
        value_pool through out and lse, as often as wanted (second gradients are the reference's, with its memory);
        gradients at padding are exactly 0.

    Raises:
        SparseForcingError (a ValueError): shapes, types, devices or the scale do not fit; a list or size names what is
        not there, where values are checked (kernels/values.py: always on a CPU, on a GPU inside `checked_values()`).
        ConfigError: a forced backend cannot run here, with the reason.
    """
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale, num_persistent)
    chosen = resolve_backend(backend, query)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in problem.inputs)
    if chosen == "cpu" and not (trains or return_mass or problem.empty) and small.takes(problem):
        found = small.forward(*problem.inputs, problem.block_index, problem.scale)
        if found is not None:
            return BlockSparseOutput(*found, None)
    if chosen == "reference" and not problem.empty:
        out, lse, mass = reference.forward(problem, return_mass)
    else:
        out, lse, mass, _ = forward_op(*problem, return_mass, trains, chosen)
    return BlockSparseOutput(out, lse, mass if return_mass else None)


def block_sparse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    query_sizes: Tensor | None = None,
    key_sizes: Tensor | None = None,
    scale: float | None = None,
    num_persistent: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (query, key_pool, value_pool) of `block_sparse_attention`, for a caller that keeps its inputs itself.

    Args:
        grad_out: gradient of `out`; out, lse: what the forward returned for the same arguments. Of 16-bit types this
            is less exact than autograd's own backward, which also keeps what rounding took from out.

    Raises:
        SparseForcingError: as the forward; or grad_out, out or lse have not the shape and type of what it returns.
    """
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale, num_persistent)
    check_outcome(problem, grad_out, out, lse)
    chosen = resolve_backend(backend, query)
    if chosen == "reference" and not problem.empty:
        grads = reference.gradients(problem, grad_out, None)
    else:
        forgotten = query.new_empty(rest_shape(query, False))
        grads = backward_op(grad_out, None, out, lse, forgotten, *problem, chosen)
    summed = (x.sum_to_size(y.shape) for x, y in zip(grads, (query, key_pool, value_pool)))  # over broadcast heads
    dq, dk, dv = summed
    return dq, dk, dv


def full_lists_attention(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, *, plus: Tensor) -> Tensor | None:
    """`block_sparse_attention(...).out + plus` where nothing is padded and every list is full, without a gradient and
    without a check: in every layer of every pass of a small model these would cost a tenth of the attention.

    Args:
        keys, values: [R, T * D] blocks, wherever they lie in these tables; rows: [B, H, Nq, M] that the lists name.
        plus: [B, H, Nq, 1, D].

    Returns:
        [B, Nq * Tq, H, D]; None where no shorter way than `block_sparse_attention` is known.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling() or not small.is_small(query, keys.shape[1], rows):
        return None
    return small.forward_plus(query, keys, values, rows, query.shape[-1] ** -0.5, plus)


def why_unavailable(backend: str, query: Tensor) -> str | None:
    """Reason why `backend` cannot run on this tensor's device and dtype, or None when it can."""
    try:
        return backend_module(backend).why_unavailable(query)
    except ImportError as error:
        return f"import failed: {error}"


def resolve_backend(backend: str, query: Tensor) -> str:
    """Name of the backend that will run; ConfigError if it was forced and cannot."""
    if backend not in BACKENDS:
        raise ConfigError(f"{OPERATION}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    preferred = "cpu" if query.device.type == "cpu" else "triton"
    if torch.compiler.is_compiling():  # availability cannot be traced; a backend that cannot run fails when it runs
        return preferred if backend == "auto" else backend
    if backend == "auto":
        return preferred if why_unavailable(preferred, query) is None else "reference"
    reason = why_unavailable(backend, query)
    if reason is not None:
        raise ConfigError(f"{OPERATION}: backend {backend!r} cannot run here: {reason}")
    return backend


def _problem(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float | None,
    num_persistent: int,
) -> Problem:
    """The checked problem, heads broadcast."""
    require_tensors(
        OPERATION,
        optional=("query_sizes", "key_sizes"),
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_index=block_index,
        query_sizes=query_sizes,
        key_sizes=key_sizes,
    )
    B, H = query.shape[:2] if query.dim() == 5 else (0, 0)
    key_pool, value_pool = _broadcast_heads(key_pool, B, H), _broadcast_heads(value_pool, B, H)
    block_index = _broadcast_heads(block_index, B, H)
    key_sizes = None if key_sizes is None else _broadcast_heads(key_sizes, B, H)
    problem = Problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, 1.0, num_persistent)
    check_shapes(problem)
    check_values(problem)
    return problem._replace(
        block_index=block_index.to(torch.int32), scale=require_scale(OPERATION, scale, query.shape[-1])
    )


def _broadcast_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    if x.dim() < 2 or x.shape[:2] == (batch, heads) or not all(n in (1, m) for n, m in zip(x.shape, (batch, heads))):
        return x  # nothing to do, or wrong: check_shapes reports it
    return x.expand(batch, heads, *x.shape[2:])
