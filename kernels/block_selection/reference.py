"""The definition of block selection and of the persistent-set update, in plain torch, on any device.

No function reads a tensor's contents on the host (`.item()`, `.tolist()`, `nonzero`), so a step can be captured in a
CUDA graph. Pooling and scores are differentiable; the choice itself is not.

Shape legend: B batch, H heads, N blocks, Nq query blocks, Nk window blocks, T tokens per block, D head dim, K kept
window blocks per query block, P persistent slots, Nc candidates for the persistent set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.reference import valid_tokens


class Pools(NamedTuple):
    """What a layer holds of its blocks, contiguous: keys, values [B, H, S, T, D]; representatives (pooled keys) and
    value_representatives (pooled values, or None) [B, H, S, D]."""

    keys: Tensor
    values: Tensor
    representatives: Tensor
    value_representatives: Tensor | None = None


def pool_blocks(x: Tensor, sizes: Tensor | None, weights: Tensor | None, projection: Tensor | None) -> Tensor:
    """[B, H, N, T, D] -> [B, H, N, D] in x's dtype, accumulated in float32 or better.

    c = (sum_t w_t x_t) / (sum_t |w_t|) over real tokens, then c @ projection[h]. The sum of |w| cannot cancel, so the
    mean stays bounded whatever a trained w becomes; w = 1 is the plain mean. A block of size 0 gives 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    T = x.shape[3]
    values = x.to(dtype)
    weight = torch.ones((1, 1, 1, T), dtype=dtype, device=x.device)
    if weights is not None:
        weight = weights.to(dtype)[:, None, :]
    valid = valid_tokens(sizes, T)
    if valid is not None:
        values = values.masked_fill(~valid.unsqueeze(-1), 0)  # padding may hold NaN, which no weight of 0 removes
        weight = weight * valid.to(dtype)
    total = weight.abs().sum(-1, keepdim=True)
    pooled = (weight / total.masked_fill(total == 0, 1)).unsqueeze(-1).mul(values).sum(3)
    if projection is not None:
        with torch.autocast(x.device.type, enabled=False):  # it would round what is ranked to 8 bits
            pooled = pooled @ projection.to(dtype)
    return pooled.to(x.dtype)


def store_blocks(
    keys: Tensor, values: Tensor, rows: Tensor, pools: Pools, sizes: Tensor | None, weights: Tensor | None
) -> None:
    """Write blocks [B, H, n, T, D] and what is pooled of them into the rows [B, H, n] of contiguous pools, in place."""
    pairs = [(pools.keys, keys), (pools.values, values)]
    pairs.append((pools.representatives, pool_blocks(keys, sizes, weights, None)))
    if pools.value_representatives is not None:
        pairs.append((pools.value_representatives, pool_blocks(values, sizes, None, None)))
    for pool, new in pairs:
        table = pool.view(pool.shape[:3].numel(), -1)
        table.index_copy_(0, rows.flatten(), new.to(pool.dtype).flatten(3).flatten(0, 2))


def block_scores(query_blocks: Tensor, key_blocks: Tensor, scale: float) -> Tensor:
    """[B, H, Nq, D] x [B, H, Nk, D] -> scale * <q, k>, [B, H, Nq, Nk] in float32 (float64 for float64 input)."""
    dtype = torch.promote_types(query_blocks.dtype, torch.float32)
    with torch.autocast(query_blocks.device.type, enabled=False):  # it would round what is ranked to 8 bits
        return query_blocks.to(dtype) @ key_blocks.to(dtype).transpose(-1, -2) * scale


def select_blocks(scores: Tensor, top_k: int, own: Tensor | None) -> Tensor:
    """[B, H, Nq, Nk] -> [B, H, Nq, min(top_k, Nk)] int32 window positions, ascending.

    A stable descending sort puts the lower position first among equals. `own` [Nq] is the window position of each
    query block itself (-1: outside the window), lifted to +inf so that it is always kept.
    """
    kept = min(top_k, scores.shape[-1])
    if own is not None:
        position = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(position == own.unsqueeze(-1), float("inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :kept]
    return order.sort(dim=-1).values.to(torch.int32)


def build_block_index(persistent_slots: Tensor, window_slots: Tensor, selected: Tensor) -> Tensor:
    """[B, H, P] slots, [B, H, Nk] slots, [B, H, Nq, K] window positions -> [B, H, Nq, P + K] int32 slots."""
    B, H, Nq, _ = selected.shape
    window = window_slots.unsqueeze(2).expand(B, H, Nq, -1).gather(-1, selected.long())
    persistent = persistent_slots.unsqueeze(2).expand(B, H, Nq, -1)
    return torch.cat((persistent, window), dim=-1).to(torch.int32)


def block_importance(scores: Tensor, query_sizes: Tensor | None) -> Tensor:
    """[B, H, Nq, Nc] scores -> [B, H, Nc]: softmax over candidates, summed over query blocks (by rows)."""
    probs = scores.softmax(dim=-1)
    if query_sizes is not None:
        probs = probs * query_sizes.to(probs.dtype).unsqueeze(-1)
    return probs.sum(dim=2)


def update_persistent(candidate_slots: Tensor, importance: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Top-C: [B, H, Nc] slots -> (kept [B, H, min(C, Nc)], freed [B, H, rest]), both in candidate order.

    The earlier candidate wins a tie (stable sort), so the result is the same on every run and device.
    """
    kept = min(capacity, candidate_slots.shape[-1])
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    winners, losers = order[..., :kept].sort(dim=-1).values, order[..., kept:].sort(dim=-1).values
    return candidate_slots.gather(-1, winners), candidate_slots.gather(-1, losers)
