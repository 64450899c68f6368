"""CPU backend: gather the listed blocks in cache-sized pieces, batched GEMMs, online softmax, flash-style backward.

pieces.py cuts and gathers, forward.py and backward.py compute. Three decisions carry the speed (figures in
README.md):

* Scores are computed key-major, s[n] = K[n] q[n]^T with shape [L, R]: every GEMM of the forward and of the backward
  then has the layout that MKL runs fastest with only R = 64 query rows, and reductions over keys run along vectors.
* A piece (some query blocks x some list entries) is a few MiB: small enough for the cache, large beside the cost of
  the torch calls that process it. Pieces of one query block add up, by an online softmax where they must.
* The persistent entries are the same for all query blocks of a head. They are visited by wide pieces, whose rows are
  many query blocks at once, so a gathered block serves hundreds of rows. Nothing else differs between the two kinds.

Softmax works in base 2: exp2 costs a third of exp here. The products of the scores carry the scale, so that queries are
used as they are. bfloat16 and float16 are computed in float32; only the factors of P V, P dO, dS K and dS Q are rounded
to bfloat16, for bfloat16 input, where oneDNN multiplies it fast. Where the CPU has matrix units, fused.py serves
what it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu import forward as cpu_forward
from sparse_forcing.kernels.block_sparse_attention.cpu import fused as cpu_fused
from sparse_forcing.kernels.block_sparse_attention.cpu.backward import backward
from sparse_forcing.kernels.block_sparse_attention.cpu.fused import has_matrix_units
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import Lists
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

__all__ = ["backward", "forward", "why_unavailable"]


def why_unavailable(query: Tensor) -> str | None:
    """Reason why this backend cannot take the tensor, or None."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}, not on the CPU"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"{query.dtype} is not supported"
    return None


def forward(problem: Problem, return_mass: bool, keep_rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.py."""
    query, block_index = problem.query, problem.block_index
    padding = _find_padding(problem.query_sizes, query)
    lists = Lists(block_index, problem.key_sizes, problem.key_pool.shape[3])
    if _is_fused(query, lists) and not (return_mass or keep_rest):
        out, lse = cpu_fused.forward(problem, lists, padding)
        return out, lse, lse.new_zeros((*block_index.shape[:3], 0)), query.new_zeros(rest_shape(query, False))
    return cpu_forward.forward(problem, lists, padding, return_mass, keep_rest)


def _find_padding(query_sizes: Tensor | None, query: Tensor) -> Tensor | None:
    """[B * H * Nq, Tq] bool, True on padding; None when no query block has any."""
    B, H, _, Tq, _ = query.shape
    if query_sizes is None or int(query_sizes.amin()) == Tq:
        return None
    return (torch.arange(Tq) >= query_sizes.unsqueeze(-1)).repeat(B * H, 1)


def _is_fused(query: Tensor, lists: Lists) -> bool:
    """Whether torch's fused attention serves these lists, and is faster here."""
    return query.dtype == torch.bfloat16 and lists.sizes is None and has_matrix_units()
