"""Entry point of persistent block-sparse attention: checks and backend choice.

Every query block lists the pool slots it attends to; one softmax runs over the tokens of the listed slots:

    out[i] = sum_j softmax_j(scale * <q_i, k_j>) v_j,      lse[i] = log sum_j exp(scale * <q_i, k_j>)

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries per query block, P persistent entries (the first `num_persistent` of each list).

The reference is plain torch that autograd already understands, so it is called directly; the other backends sit behind
one custom op (ops.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.kernels.block_sparse_attention import reference
from sparse_forcing.kernels.block_sparse_attention.ops import (
    BACKEND_MODULES,
    backend_module,
    backward_op,
    forward_op,
    rest_shape,
)

BACKENDS = ("auto", *BACKEND_MODULES)
"""Names that `backend` takes; "auto" chooses by the device of the tensors."""


class BlockSparseOutput(NamedTuple):
    """out [B, H, Nq, Tq, D] in query's dtype; lse [B, H, Nq, Tq], natural log; mass [B, H, Nq, M] or None."""

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
        block_index: [B, H, Nq, M] int32, slots without duplicates, -1 only at the end of a row; rows may be empty.
        query_sizes: [Nq] int32, real rows of each query block; None means Tq everywhere.
        key_sizes: [B, H, S] int32, real tokens of each slot; None means T everywhere.
        scale: factor on the scores; None means 1 / sqrt(D).
        num_persistent: promise that the first so many entries of every row of one (batch, head) are the same slots.
            A hint for speed; with a broken promise the CPU path's result is undefined.
        return_mass: also return the attention probability of each listed block, summed over real query rows, detached.
        backend: "auto" (triton on a GPU, cpu on the CPU, else reference) or one of them by name.

    Returns:
        BlockSparseOutput. Padded and empty rows give out 0 and lse -inf. Differentiable in query, key_pool and
        value_pool through out and lse; gradients at padding are exactly 0.

    Raises:
        SparseForcingError (a ValueError): shapes, types or devices do not fit; ConfigError when a forced backend
        cannot run here, with the reason.
    """
    B, H = query.shape[:2] if query.dim() == 5 else (0, 0)
    key_pool, value_pool = _broadcast_heads(key_pool, B, H), _broadcast_heads(value_pool, B, H)
    block_index = _broadcast_heads(block_index, B, H).to(torch.int32)
    key_sizes = None if key_sizes is None else _broadcast_heads(key_sizes, B, H)
    _check(query, key_pool, value_pool, block_index, query_sizes, key_sizes, num_persistent)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = resolve_backend(backend, query)
    args = (query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale, num_persistent, return_mass)
    if chosen == "reference":
        out, lse, mass = reference.forward(*args)
    else:
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key_pool, value_pool))
        out, lse, mass, _ = forward_op(*args, trains, chosen)
    return BlockSparseOutput(out, lse, mass if return_mass else None)


@torch.no_grad()
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
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = resolve_backend(backend, query)
    rest = (block_index, query_sizes, key_sizes)
    if chosen != "reference":
        forgotten = query.new_empty(rest_shape(query, False))
        kept = (out, lse, forgotten, scale, num_persistent, chosen)
        return backward_op(grad_out, None, query, key_pool, value_pool, *rest, *kept)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key_pool, value_pool))
        again = reference.forward(q, k, v, *rest, scale, num_persistent, False)[0]
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad_out)
        return dq, dk, dv


def why_unavailable(backend: str, query: Tensor) -> str | None:
    """Reason why `backend` cannot run on this tensor's device and dtype, or None when it can."""
    try:
        return backend_module(backend).why_unavailable(query)
    except ImportError as error:
        return f"import failed: {error}"


def resolve_backend(backend: str, query: Tensor) -> str:
    """Name of the backend that will run; ConfigError if it was forced and cannot."""
    if backend not in BACKENDS:
        raise ConfigError(f"block_sparse_attention: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    preferred = "cpu" if query.device.type == "cpu" else "triton"
    if torch.compiler.is_compiling():  # availability cannot be traced; a backend that cannot run fails when it runs
        return preferred if backend == "auto" else backend
    if backend == "auto":
        return preferred if why_unavailable(preferred, query) is None else "reference"
    reason = why_unavailable(backend, query)
    if reason is not None:
        raise ConfigError(f"block_sparse_attention: backend {backend!r} cannot run here: {reason}")
    return backend


def _broadcast_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    if x.dim() < 2 or x.shape[:2] == (batch, heads) or not all(n in (1, m) for n, m in zip(x.shape, (batch, heads))):
        return x  # nothing to do, or wrong: _check reports it
    return x.expand(batch, heads, *x.shape[2:])


def _check(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    num_persistent: int,
) -> None:
    def fail(what: str, tensor: Tensor, wanted: str) -> None:
        raise SparseForcingError(
            f"block_sparse_attention: {what} is {list(tensor.shape)} {tensor.dtype}, need {wanted}"
        )

    if query.dim() != 5 or not query.is_floating_point():
        fail("query", query, "floating point [B, H, Nq, Tq, D]")
    B, H, Nq, _, D = query.shape
    for what, pool in (("key_pool", key_pool), ("value_pool", value_pool)):
        if pool.dim() != 5 or pool.shape[:2] != (B, H) or pool.shape[-1] != D or pool.dtype != query.dtype:
            fail(what, pool, f"{query.dtype} [{B}, {H}, S, T, {D}] to match query")
    if value_pool.shape != key_pool.shape:
        fail("value_pool", value_pool, f"the shape of key_pool {list(key_pool.shape)}")
    if block_index.dim() != 4 or block_index.shape[:3] != (B, H, Nq):
        fail("block_index", block_index, f"int32 [{B}, {H}, {Nq}, M]")
    if query_sizes is not None and (query_sizes.shape != (Nq,) or query_sizes.dtype != torch.int32):
        fail("query_sizes", query_sizes, f"int32 [{Nq}]")
    if key_sizes is not None and (key_sizes.shape != key_pool.shape[:3] or key_sizes.dtype != torch.int32):
        fail("key_sizes", key_sizes, f"int32 {list(key_pool.shape[:3])}")
    if not 0 <= num_persistent <= block_index.shape[-1]:
        fail("block_index", block_index, f"at least num_persistent = {num_persistent} entries per row")
    for tensor in (key_pool, value_pool, block_index, query_sizes, key_sizes):
        if tensor is not None and tensor.device != query.device:
            raise SparseForcingError(f"block_sparse_attention: inputs on {query.device} and {tensor.device}")
