"""CPU forward of small pools without gradients: scores with the whole pool, where unlisted blocks weigh nothing.

Where lists name half of a pool or more, three products over all of it take less time than gathering what is listed: the
blocks stay where they lie, and the cache holds the scores and not copies of the pool.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.arithmetic import SAFE_SUM
from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer

SCORE_BYTES = 1 << 20  # scores of every row with the whole pool, per thread: more no longer stays in the cache
UNLISTED = 2  # blocks of the pool for each that is listed: more are better gathered


def takes(query: Tensor, pool: Tensor, index: Tensor) -> bool:
    """Whether these lists are best served so; query [B, H, Nq, Tq, D], pool [B, H, S, T, D], index [B, H, Nq, M]."""
    slots, tokens = pool.shape[2:4]
    size = query.shape[:-1].numel() * slots * tokens * query.element_size()
    return slots <= UNLISTED * index.shape[-1] and size <= SCORE_BYTES * torch.get_num_threads()


def forward(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, index: Tensor, scale: float, plus: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq]) of full blocks and full lists; see small.py.

    None where a weight is too large or a sum too small to be exact without its row's maximum, or where what is not
    listed holds something that is no number: 0 times it would not be 0.
    """
    B, H, Nq, Tq, D = query.shape
    slots, tokens = key_pool.shape[2:4]
    q, k, v = (x.reshape(B * H, -1, D) for x in (query, key_pool, value_pool))
    p = Buffer.of("scores", query.dtype).bmm(q, k.mT, factor=scale).exp_()
    listed = torch.zeros(B * H, Nq, 1, slots, dtype=query.dtype)
    listed.view(B, H, Nq, slots).scatter_add_(3, index.long(), _one(query.dtype).expand(index.shape))
    p.view(B * H, Nq, Tq, -1).mul_(listed.repeat_interleave(tokens, -1))
    total, out = p.sum(-1, keepdim=True), torch.bmm(p, v).view(query.shape)
    least, most = (float(x) for x in total.aminmax())
    if not (1 / SAFE_SUM < least and most < SAFE_SUM and math.isfinite(float(out.sum()))):
        return None
    lse, total = total.log().view(query.shape[:-1]), total.view(B, H, Nq, Tq, 1)
    return out.div_(total) if plus is None else torch.addcdiv(plus, out, total), lse


@lru_cache(maxsize=8)
def _one(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=dtype)
