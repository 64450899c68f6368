"""From lists of slots to what the kernels walk: lengths, inverses for the backward.

Everything stays on the device and has a size known in advance, so a step can be captured in a CUDA graph.

Shape legend: B batch, H heads, Nq query blocks, M list entries, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_forcing.kernels.triton_runtime import program_head


def list_counts(block_index: Tensor) -> Tensor:
    """[B, H, Nq, M] -> [B, H, Nq] int32 entries that are not -1 padding."""
    return (block_index >= 0).sum(-1, dtype=torch.int32)


def inverse_lists(block_index: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Which query blocks visit each slot: (start [B, H, S + 1], visitors [B, H, Nq * M]), int32, compressed rows.

    Slot s is visited by visitors[start[s] : start[s + 1]], ascending, because the sort is stable: the dk, dv kernel
    adds in the same order on every run and needs no atomics. Padding sorts to the end, behind every slot.
    """
    B, H, Nq, M = block_index.shape
    owner = torch.where(block_index < 0, slots, block_index).reshape(B, H, Nq * M)
    ordered, position = torch.sort(owner, dim=-1, stable=True)
    edges = torch.arange(slots + 1, dtype=ordered.dtype, device=ordered.device).expand(B, H, slots + 1)
    start = torch.searchsorted(ordered, edges.contiguous(), out_int32=True)
    return start, (position // max(M, 1)).to(torch.int32)


@triton.jit(do_not_specialize=["list_length"])
def block_mass(
    row_mass, lse, counts, query_sizes, mass, query_blocks, list_length,
    Tq: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, RAGGED_Q: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """mass[i, j] = sum over real rows r of total[i, j, r] 2^(m[i, j, r] - lse_2[i, r]): the probability of block j,
    summed over its PARTS.

    row_mass holds the running maximum m and the row sums `total` of each visited block (see `forward_pointer`). m is at
    most lse_2, so nothing overflows. One program per query block; entries past the list give 0.
    """
    head, block = program_head(MANY_HEADS), tl.program_id(0)
    rows, entries = tl.arange(0, ROWS), tl.arange(0, BLOCK_M)
    which = head * query_blocks + block
    query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq
    row_lse = tl.load(lse + which * Tq + rows, mask=rows < query_size, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * 1.4426950408889634)
    count = tl.load(counts + which)
    for offset in tl.range(0, list_length, BLOCK_M):
        at = offset + entries
        listed = (at < count)[:, None] & (rows < query_size)[None, :]
        share = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.static_range(PARTS):
            place = ((which * list_length + at) * PARTS + part)[:, None] * (2 * ROWS) + rows[None, :]
            m = tl.load(row_mass + place, mask=listed, other=float("-inf"))
            total = tl.load(row_mass + place + ROWS, mask=listed, other=0.0)
            share += tl.sum(total * tl.math.exp2(m - row_lse[None, :]), 1)
        tl.store(mass + which * list_length + at, share, mask=at < list_length)
