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

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries; in a piece: n items, R rows each, m entries each, L = m * T keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu import forward as cpu_forward
from sparse_forcing.kernels.block_sparse_attention.cpu import fused as cpu_fused
from sparse_forcing.kernels.block_sparse_attention.cpu.arithmetic import work_dtype
from sparse_forcing.kernels.block_sparse_attention.cpu.backward import backward
from sparse_forcing.kernels.block_sparse_attention.cpu.fused import has_matrix_units
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import Lists
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape

__all__ = ["backward", "forward", "why_unavailable"]


def why_unavailable(query: Tensor) -> str | None:
    """Reason why this backend cannot take the tensor, or None."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}, not on the CPU"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"{query.dtype} is not supported"
    return None


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
    """See ops.py."""
    B, H, Nq, _, _ = query.shape
    T, M = key_pool.shape[3], block_index.shape[-1]
    if not block_index.numel():
        return *_nothing_listed(query, M if return_mass else 0), query.new_zeros(rest_shape(query, keep_rest))
    padding, lists = _padded_rows(query_sizes, query), Lists(block_index, key_sizes, T)
    if _fused(query, lists) and not (return_mass or keep_rest):
        out, lse = cpu_fused.forward(query, key_pool, value_pool, lists, padding, scale, num_persistent)
        return out, lse, lse.new_zeros((B, H, Nq, 0)), query.new_zeros(rest_shape(query, False))
    return cpu_forward.forward(
        query, key_pool, value_pool, lists, padding, scale, num_persistent, return_mass, keep_rest
    )


def _nothing_listed(query: Tensor, mass_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and mass of empty lists."""
    lse = torch.full(query.shape[:-1], float("-inf"), dtype=work_dtype(query))
    return torch.zeros(query.shape, dtype=query.dtype), lse, lse.new_zeros((*query.shape[:3], mass_entries))


def _padded_rows(query_sizes: Tensor | None, query: Tensor) -> Tensor | None:
    """[B * H * Nq, Tq] bool, True on padding; None when no query block has any."""
    B, H, _, Tq, _ = query.shape
    if query_sizes is None or int(query_sizes.amin()) == Tq:
        return None
    return (torch.arange(Tq) >= query_sizes.unsqueeze(-1)).repeat(B * H, 1)


def _fused(query: Tensor, lists: Lists) -> bool:
    """Whether torch's fused attention serves these lists, and is faster here."""
    return query.dtype == torch.bfloat16 and lists.sizes is None and has_matrix_units()
