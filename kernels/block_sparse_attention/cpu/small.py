"""CPU forward of small problems without gradients: all listed blocks gathered at once, two products over them.

A small model spends its time between calls, and forward.py, whose arithmetic this is, makes a dozen for each piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.arithmetic import LOG2E, SAFE_SUM
from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import as_table, first_rows
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

GATHERED_BYTES = 3 << 20  # keys and values of all lists, per thread: more no longer stays in the cache


def takes(problem: Problem) -> bool:
    """Whether this is a small problem in float32 of full blocks and full lists, whose values can be read."""
    query, pool, _, index, query_sizes, key_sizes, _, _ = problem
    if query_sizes is not None or key_sizes is not None or torch.compiler.is_compiling() or type(query) is not Tensor:
        return False
    return is_small(query, pool.shape[3] * pool.shape[4], index) and int(index.amin()) >= 0


def is_small(query: Tensor, block_numbers: int, index: Tensor) -> bool:
    """Whether these lists of blocks, each of so many numbers, are so short that they are best gathered at once."""
    gathered = 2 * index.numel() * block_numbers * query.element_size()
    return query.dtype == torch.float32 and gathered <= GATHERED_BYTES * torch.get_num_threads()


def forward(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """(out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq]) of full blocks and full lists, which are not checked here; in legend
    and meaning those of problem.py. None where `sums` is."""
    B, H, _, _ = index.shape
    rows: dict[tuple[int, int], Tensor] = {}

    def listed(pool: Tensor) -> tuple[Tensor, Tensor]:
        table, steps = as_table(pool)
        if steps not in rows:
            rows[steps] = (index + first_rows(B, H, *steps, 1).view(B, H, 1, 1)).flatten()
        return table, rows[steps]

    found = sums(query, listed(key_pool), listed(value_pool), scale)
    return None if found is None else (found[0].div_(found[1]), found[1].squeeze(-1).log_())


def forward_plus(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, scale: float, plus: Tensor
) -> Tensor | None:
    """out + plus [B, H, Nq, 1, D] as [B, Nq * Tq, H, D], in the order of tokens that the layers after it read; of lists
    of `rows` [B, H, Nq, M] of the tables keys and values. None where `sums` is."""
    listed = rows.flatten()
    found = sums(query, (keys, listed), (values, listed), scale)
    if found is None:
        return None
    B, H, Nq, Tq, D = query.shape
    out = query.new_empty(B, Nq, Tq, H, D)
    torch.addcdiv(plus, *found, out=out.permute(0, 3, 1, 2, 4))
    return out.flatten(1, 2)


def sums(
    query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor] | None:
    """(values summed by their weights [B, H, Nq, Tq, D], weights summed [B, H, Nq, Tq, 1]), a weight being exp(score).

    keys, values: a table [R, T * D] and the rows [B * H * Nq * M] of it that the lists name.

    None where a weight is too large or a sum too small to be exact without its row's maximum, or no number: the other
    path gives what is due.
    """
    B, H, Nq, Tq, D = query.shape
    items, (table, rows) = B * H * Nq, keys
    # values overwrite keys: half the cache
    blocks = Buffer.of("stored keys", query.dtype).view(len(rows), table.shape[1])
    tokens = blocks.view(items, -1, D)
    torch.index_select(table, 0, rows, out=blocks)
    p = Buffer.of("scores", query.dtype).bmm(query.reshape(items, Tq, D), tokens.mT, factor=scale * LOG2E).exp2_()
    total = p.sum(-1, keepdim=True)
    least, most = (float(x) for x in total.aminmax())
    if not (1 / SAFE_SUM < least and most < SAFE_SUM):
        return None
    table, rows = values
    torch.index_select(table, 0, rows, out=blocks)
    return torch.bmm(p, tokens).view(query.shape), total.view(B, H, Nq, Tq, 1)
