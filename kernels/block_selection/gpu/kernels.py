"""Kernels of block selection: pooling in one pass, scores and row-wise top-K without storing a score matrix, Top-C.

The choice is exact and deterministic: the K-th largest score of a row is found bit by bit (32 counting steps),
everything above it is kept, and among equals the lowest positions. Indices come out ascending from a running count,
so nothing is sorted and no atomics are used.

Shape legend: N blocks, T tokens per block, D head dim, Nq query blocks, Nk window blocks, R rows of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_forcing.kernels.triton_runtime import program_head


@triton.jit(do_not_specialize=["blocks"])
def pool_kernel(
    x, sizes, weights, pooled, sxb, sxh, sxn, sxt, sxd, heads, blocks,
    T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr, WEIGHTED: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """pooled [B*H, N, D]: sum_t w_t x_t / sum_t |w_t| over the real tokens of one block.

    x is read once, in 16-byte pieces along D; padding is masked at the load, so it may hold NaN. sizes [B*H, N].
    """
    head, block = program_head(MANY_HEADS), tl.program_id(0)
    batch, of_batch = head // heads, head % heads
    tokens, dims = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    size = tl.load(sizes + head * blocks + block) if RAGGED else T
    real = tokens < tl.minimum(size, T)
    w = real.to(tl.float32)
    if WEIGHTED:
        w = tl.load(weights + of_batch * T + tokens, mask=real, other=0.0).to(tl.float32)
    base = x + batch * sxb + of_batch * sxh + block.to(tl.int64) * sxn
    place = tokens.to(tl.int64)[:, None] * sxt + dims.to(tl.int64)[None, :] * sxd
    values = tl.load(base + place, mask=real[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(tl.abs(w), 0)
    mean = tl.sum(values * w[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(pooled + (head * blocks + block) * D + dims, mean, mask=dims < D)


@triton.jit
def _weighted_mean(values, w):
    """[D] of values [T, D] by weights [T]."""
    total = tl.sum(tl.abs(w), 0)
    return tl.sum(values * w[:, None], 0) / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["blocks"])
def store_kernel(
    keys, values, rows, sizes, weights, key_pool, value_pool, pooled_keys, pooled_values,
    skb, skh, skn, skt, svb, svh, svn, svt, heads, blocks,
    T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr, WEIGHTED: tl.constexpr, POOL_VALUES: tl.constexpr, MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """Copy one block of keys and values [B, H, n, T, D] to its row of the pools, and its means to those of the pooled
    ones: each is read once. rows [B*H, n]; sizes [n]; weights [H, T] of keys."""
    head, block = program_head(MANY_HEADS), tl.program_id(0).to(tl.int64)
    batch, of_batch = head // heads, head % heads
    tokens, dims = tl.arange(0, BLOCK_T).to(tl.int64), tl.arange(0, BLOCK_D)
    tile = (tokens < T)[:, None] & (dims < D)[None, :]
    size = tl.load(sizes + block) if RAGGED else T
    real = tokens < tl.minimum(size, T)
    row = tl.load(rows + head * blocks + block).to(tl.int64)
    inside = tokens[:, None] * D + dims[None, :]

    k = tl.load(
        keys + batch * skb + of_batch * skh + block * skn + tokens[:, None] * skt + dims[None, :], mask=tile, other=0.0
    )
    tl.store(key_pool + row * T * D + inside, k, mask=tile)
    w = real.to(tl.float32)
    if WEIGHTED:
        w = tl.load(weights + of_batch * T + tokens, mask=real, other=0.0).to(tl.float32)
    k = tl.where(real[:, None], k.to(tl.float32), 0.0)  # padding may hold NaN, which no weight of 0 removes
    tl.store(pooled_keys + row * D + dims, _weighted_mean(k, w), mask=dims < D)

    v = tl.load(
        values + batch * svb + of_batch * svh + block * svn + tokens[:, None] * svt + dims[None, :],
        mask=tile,
        other=0.0,
    )
    tl.store(value_pool + row * T * D + inside, v, mask=tile)
    if POOL_VALUES:
        v = tl.where(real[:, None], v.to(tl.float32), 0.0)
        tl.store(pooled_values + row * D + dims, _weighted_mean(v, real.to(tl.float32)), mask=dims < D)


@triton.jit
def _ordered(scores):
    """float32 -> uint32 with the same order; -0 equals 0, NaN is above all, whatever its sign. The smallest real number
    maps above 0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores == scores, signed, 0x7FFFFFFF).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _keep_largest(keys, kept):
    """[R, N] bool: the `kept` largest keys of each row, lower positions first among equals. Keys of 0 never count."""
    probe = tl.max(tl.zeros_like(keys), 1) + 0x80000000
    threshold = tl.zeros_like(probe)
    for _ in range(32):  # the largest value that at least `kept` keys reach, from the highest bit down
        candidate = threshold | probe
        enough = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1) >= kept
        threshold = tl.where(enough, candidate, threshold)
        probe = probe >> 1
    above = keys > threshold[:, None]
    equal = (keys == threshold[:, None]) & (keys > 0)
    room = kept - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _write_ascending(selected, positions, out, rows, row_stride, written):
    """Store the positions of the selected columns of each row, ascending, at out + row * row_stride."""
    place = tl.cumsum(selected.to(tl.int32), 1) - 1
    tl.store(out + (rows * row_stride)[:, None] + place, positions, mask=selected & written[:, None])


@triton.jit(do_not_specialize=["query_blocks", "window", "persistent"])
def choose_kernel(
    query_blocks_ptr, key_blocks_ptr, own, persistent_slots, window_slots, chosen, scale, query_blocks, window, kept,
    persistent, D: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    OWN: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """chosen [B*H, Nq, persistent + kept] int32 of ROWS query blocks: scores = scale q k^T live in registers only,
    [ROWS, BLOCK_N].

    With SLOTS a row is the list that the attention reads: persistent_slots [B*H, P], then the window_slots [B*H, Nk] of
    the kept columns. Without, it is the kept columns alone, and persistent is 0.

    query blocks [B*H, Nq, D], key blocks [B*H, Nk, D], contiguous. The product runs over D in STEPs, so that shared
    memory holds a slice of all key blocks instead of all of them.
    """
    head = program_head(MANY_HEADS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, dims = tl.arange(0, BLOCK_N), tl.arange(0, STEP)
    inside = rows < query_blocks
    if SLOTS:
        out = chosen + ((head * query_blocks + rows) * (persistent + kept))[:, None]
        for start in tl.range(0, persistent, BLOCK_P):
            at = start + tl.arange(0, BLOCK_P)
            slots = tl.load(persistent_slots + head * persistent + at, mask=at < persistent, other=0).to(tl.int32)
            shared = slots[None, :] + tl.zeros([ROWS, BLOCK_P], tl.int32)
            tl.store(out + at[None, :], shared, mask=inside[:, None] & (at < persistent)[None, :])
    q_row = query_blocks_ptr + (head * query_blocks + rows)[:, None] * D
    k_row = key_blocks_ptr + (head * window + columns)[None, :] * D
    scores = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for offset in tl.range(0, D, STEP):
        at = offset + dims
        q = tl.load(q_row + at[None, :], mask=inside[:, None] & (at < D)[None, :], other=0.0)
        k = tl.load(k_row + at[:, None], mask=(columns < window)[None, :] & (at < D)[:, None], other=0.0)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
    scores = scores * scale
    if OWN:
        mine = tl.load(own + rows, mask=inside, other=-1)
        scores = tl.where(columns[None, :] == mine[:, None], float("inf"), scores)
    keys = tl.where((columns < window)[None, :], _ordered(scores), 0)
    names = columns
    if SLOTS:
        names = tl.load(window_slots + head * window + columns, mask=columns < window, other=0).to(tl.int32)
    spread = names[None, :] + tl.zeros([ROWS, BLOCK_N], tl.int32)
    row, length = head * query_blocks + rows, persistent + kept
    _write_ascending(_keep_largest(keys, kept), spread, chosen + persistent, row, length, inside)


@triton.jit(do_not_specialize=["query_blocks", "window"])
def select_kernel(
    scores_ptr, own, selected, query_blocks, window, kept,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """`choose_kernel` from stored scores [B*H, Nq, Nk] float32."""
    head = program_head(MANY_HEADS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    inside = rows < query_blocks
    place = (head * query_blocks + rows)[:, None] * window + columns[None, :]
    listed = inside[:, None] & (columns < window)[None, :]
    scores = tl.load(scores_ptr + place, mask=listed, other=0.0)
    if OWN:
        mine = tl.load(own + rows, mask=inside, other=-1)
        scores = tl.where(columns[None, :] == mine[:, None], float("inf"), scores)
    keys = tl.where((columns < window)[None, :], _ordered(scores), 0)
    spread = columns[None, :] + tl.zeros([ROWS, BLOCK_N], tl.int32)
    _write_ascending(_keep_largest(keys, kept), spread, selected, head * query_blocks + rows, kept, inside)


@triton.jit(do_not_specialize=["candidates"])
def update_kernel(
    slots, importance, kept_slots, freed_slots, candidates, capacity, BLOCK_N: tl.constexpr, MANY_HEADS: tl.constexpr
):
    """Top-C of one head's candidates: kept_slots [B*H, C] and freed_slots [B*H, Nc - C], both in candidate order."""
    head = program_head(MANY_HEADS)
    columns = tl.arange(0, BLOCK_N)[None, :]
    listed = columns < candidates
    score = tl.load(importance + head * candidates + columns, mask=listed, other=0.0)
    slot = tl.load(slots + head * candidates + columns, mask=listed, other=-1)
    winner = _keep_largest(tl.where(listed, _ordered(score), 0), capacity)
    row, always = head + tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
    _write_ascending(winner, slot, kept_slots, row, capacity, always)
    _write_ascending(listed & (winner == 0), slot, freed_slots, row, candidates - capacity, always)
