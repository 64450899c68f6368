"""Blocks of a pool, read and written by their slots, which differ per head; and blocks in 8 bits.

Legend: B batch, H heads, S slots of the pool, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_slots(x: Tensor, slots: Tensor) -> Tensor:
    """x [B, H, S, ...] at slots [B, H, N] -> [B, H, N, ...]."""
    return x.gather(2, slot_index(slots, x))


def slot_index(slots: Tensor, x: Tensor) -> Tensor:
    """Slots [B, H, N] as an index of all of x [B, H, S, ...] there: [B, H, N, ...]."""
    return slots.long().reshape(*slots.shape, *[1] * (x.ndim - 3)).expand(*slots.shape, *x.shape[3:])


@torch.no_grad()
def put_slots_(pools: Sequence[Tensor], slots: Tensor, blocks: Sequence[Tensor], rows: Tensor | None = None) -> None:
    """Copy blocks [B, H, N, ...] into contiguous pools [B, H, S, ...] at slots [B, H, N], in place.

    Args:
        rows: [B, H, N] the same slots as rows of the pools' first three dimensions flattened, where that is known.
    """
    B, H, S = pools[0].shape[:3]
    if rows is None:
        rows = slots + S * torch.arange(B * H, device=slots.device).view(B, H, 1)
    rows = rows.flatten()
    for pool, new in zip(pools, blocks):
        pool.view(B * H * S, -1).index_copy_(0, rows, new.to(pool.dtype).reshape(len(rows), -1))


def round_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [..., T, D] in 8 bits: whole numbers up to 127, and bfloat16 scales [..., D] of a block's channels."""
    tiny = torch.finfo(torch.bfloat16).tiny
    scales = (blocks.abs().amax(-2) / 127).to(torch.bfloat16).clamp(min=tiny)
    return (blocks / scales.to(blocks.dtype).unsqueeze(-2)).round().clamp(-127, 127).to(torch.int8), scales


def widen_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """What `round_blocks` made, as numbers again; written into `out` where one is given."""
    return torch.mul(codes, scales.to(dtype).unsqueeze(-2), out=out)
