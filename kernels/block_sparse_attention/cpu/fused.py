"""CPU forward in bfloat16 by torch's fused attention over gathered blocks, for CPUs with matrix units.

torch's own kernel multiplies bfloat16 with float32 sums and keeps the scores in the cache, which no sequence of torch
calls can. With matrix units (AMX) its products are so fast that the float32 scores of forward.py would take most of
the time; without them the products there are as fast or faster (figures in README.md). Pieces of one row are merged by
their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import BlockTable, Lists, cut_lists
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

PIECE_BYTES = 2 << 20  # gathered keys and values of a piece, per thread
WHOLE_ROWS = 1 << 30  # every row of a head visits the persistent blocks in one piece: more rows are faster

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX), which torch's fused attention uses."""
    return bool(torch.cpu._is_amx_tile_supported())


def forward(problem: Problem, lists: Lists, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq] in float32) of lists without padded keys; padding [B * H * Nq, Tq]
    marks padded rows."""
    query, scale = problem.query, problem.scale
    B, H, Nq, Tq, D = query.shape
    entries = (problem.num_persistent, lists.slots.shape[1])
    cuts = cut_lists(
        (B * H, Nq),
        Tq,
        entries,
        (lists.tokens, D),
        element_bytes=2 * query.element_size(),
        budget=PIECE_BYTES * torch.get_num_threads(),
        wide_rows=WHOLE_ROWS,
        scores=False,
    )
    merged = any(len(cut.entries) > 1 or cut.entries.start for cut in cuts)
    q = query.flatten(0, 2)
    out = torch.empty(q.shape, dtype=torch.float32 if merged else query.dtype)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    keys, values = BlockTable(problem.key_pool, lists), BlockTable(problem.value_pool, lists)
    k_buffer, v_buffer = (Buffer.of(purpose, query.dtype) for purpose in ("stored keys", "stored values"))
    for cut in cuts:
        rows, tables = (cut.rows(x) for x in (q, out, lse)), (cut.flat_lists(x.rows) for x in (keys, values))
        for first, q_p, out_p, lse_p, key_rows, value_rows in zip(cut.first(), *rows, *tables):
            k, v = keys.gather(key_rows, q_p.shape[0], k_buffer), values.gather(value_rows, q_p.shape[0], v_buffer)
            part, part_lse = (x.squeeze(1) for x in _flash(*(x.unsqueeze(1) for x in (q_p, k, v)), scale=scale))
            if first:
                out_p.copy_(part)
                lse_p.copy_(part_lse)
            else:
                _merge(out_p, lse_p, part, part_lse)
    if padding is not None:
        out.masked_fill_(padding.unsqueeze(-1), 0)
        lse.masked_fill_(padding, float("-inf"))
    return out.to(query.dtype).view(query.shape), lse.view(query.shape[:-1])


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take a part [n, R, D], [n, R] of the softmax into what is there of its rows."""
    out.lerp_(part.float(), torch.sigmoid(part_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)
