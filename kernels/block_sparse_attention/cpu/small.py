"""CPU forward of small problems without gradients: all listed blocks gathered at once, one call of torch's attention.

A small model spends its time between calls, and forward.py makes a dozen for each piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu import whole
from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import as_table, first_rows
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

GATHERED_BYTES = 3 << 20  # keys and values of all lists, per thread: more no longer stays in the cache

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def takes(problem: Problem) -> bool:
    """Whether this is a small problem in float32 of full blocks and full lists, whose values can be read."""
    query, pool, _, index, query_sizes, key_sizes, _, _ = problem
    if query_sizes is not None or key_sizes is not None or torch.compiler.is_compiling() or type(query) is not Tensor:
        return False
    return is_small(query, pool, index) and int(index.amin()) >= 0


def is_small(query: Tensor, pool: Tensor, index: Tensor) -> bool:
    """Whether these lists are so short that they are best gathered at once."""
    gathered = 2 * index.numel() * pool.shape[3] * pool.shape[4] * query.element_size()
    return query.dtype == torch.float32 and gathered <= GATHERED_BYTES * torch.get_num_threads()


def forward(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, index: Tensor, scale: float, plus: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """(out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq]) of full blocks and full lists, which are not checked here; in legend
    and meaning those of problem.py. plus: [B, H, Nq, 1, D] to add to out.

    None where a row's scores are all NaN or -inf, for which torch's kernel has 0 in both: the other path gives what is
    due.
    """
    if whole.takes(query, key_pool, index):
        found = whole.forward(query, key_pool, value_pool, index, scale, plus)
        if found is not None:
            return found
    B, H, Nq, Tq, D = query.shape
    rows: dict[tuple[int, int], Tensor] = {}

    def gather_listed(pool: Tensor, purpose: str) -> Tensor:
        """[1, B * H * Nq, M * T, D]"""
        table, steps = as_table(pool)
        if steps not in rows:
            rows[steps] = (index + first_rows(B, H, *steps, 1).view(B, H, 1, 1)).flatten()
        memory = Buffer.of(purpose, pool.dtype).view(len(rows[steps]), table.shape[1])
        return torch.index_select(table, 0, rows[steps], out=memory).view(1, B * H * Nq, -1, D)

    q = query.contiguous().view(1, B * H * Nq, Tq, D)
    out, lse = _flash(
        q, gather_listed(key_pool, "stored keys"), gather_listed(value_pool, "stored values"), scale=scale
    )
    if not bool(lse.all()):
        return None
    out = out.view(query.shape)
    return out if plus is None else out.add_(plus), lse.view(query.shape[:-1])
