"""From lists of slots to what the kernels walk: lengths, unions for pairs of query blocks, inverses for the backward.

Everything stays on the device and has a size known in advance, so a step can be captured in a CUDA graph.

Shape legend: B batch, H heads, Nq query blocks, M list entries, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit(do_not_specialize=["query_blocks", "list_length", "width"])
def pair_lists(
    block_index, codes, counts, query_blocks, list_length, width,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Union of the lists of query blocks 2p and 2p + 1 (p = program_id(0)) of head program_id(1).

    codes [B*H, pairs, width]: the even list in its order, then what only the odd one has; 4 * slot + 1 (even lists
    it) + 2 (odd lists it). counts [B*H, pairs] is rounded up to a multiple of GROUP; the filling entries repeat the
    first slot with no bit set. SHARED promises equal lists: the even one is taken for both.
    """
    pair = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    lane, part = tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    even_row = block_index + (head * query_blocks + 2 * pair) * list_length
    odd_row = even_row + list_length
    odd_length = 0 if SHARED else tl.where(2 * pair + 1 < query_blocks, list_length, 0)
    even = tl.load(even_row + lane, mask=lane < list_length, other=-1)
    odd = tl.load(odd_row + lane, mask=lane < odd_length, other=-1)

    shared = tl.zeros([BLOCK_M], tl.int32)  # even entry also in odd
    known = tl.zeros([BLOCK_M], tl.int32)  # odd entry also in even
    for offset in tl.range(0, 0 if SHARED else list_length, CHUNK):
        at = offset + part
        some_odd = tl.load(odd_row + at, mask=at < odd_length, other=-1)
        some_even = tl.load(even_row + at, mask=at < list_length, other=-1)
        shared += tl.sum((even[:, None] == some_odd[None, :]).to(tl.int32), 1)
        known += tl.sum((odd[:, None] == some_even[None, :]).to(tl.int32), 1)

    row = codes + (head * tl.num_programs(0) + pair) * width
    kept = even >= 0
    first = tl.sum(kept.to(tl.int32), 0)
    tl.store(row + lane, even * 4 + 1 + 2 * (shared > 0).to(tl.int32), mask=kept)
    extra = (odd >= 0) & (known == 0)
    place = first + tl.cumsum(extra.to(tl.int32), 0) - 1
    tl.store(row + place, odd * 4 + 2, mask=extra)
    length = first + tl.sum(extra.to(tl.int32), 0)
    rounded = (length + GROUP - 1) // GROUP * GROUP
    filler = tl.maximum(tl.max(tl.where(lane == 0, even, -1), 0), 0)
    filler = tl.where(first > 0, filler, tl.maximum(tl.max(tl.where(lane == 0, odd, -1), 0), 0))
    fill = length + tl.arange(0, 4)
    tl.store(row + fill, tl.zeros([4], tl.int32) + filler * 4, mask=fill < rounded)
    tl.store(counts + head * tl.num_programs(0) + pair, rounded)


@triton.jit(do_not_specialize=["list_length"])
def block_mass(
    row_mass, lse, counts, query_sizes, mass, query_blocks, list_length,
    Tq: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, RAGGED_Q: tl.constexpr,
):  # fmt: skip
    """mass[i, j] = sum over real rows r of total[i, j, r] 2^(m[i, j, r] - lse_2[i, r]): the probability of block j,
    summed over its PARTS.

    row_mass holds the running maximum m and the row sums `total` of each visited block (see `forward_pointer`). m is at
    most lse_2, so nothing overflows. One program per query block; entries past the list give 0.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
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
