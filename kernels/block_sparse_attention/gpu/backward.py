"""Backward kernels: dq over the forward lists, dk and dv over their inverse. Deterministic, no atomics.

With p = 2^(scale_2 s - lse_2) recomputed from the saved log-sum-exp, and g the gradient of lse:

    dp = do v^T,   delta_i = sum_d do_i o_i - g_i,   ds = p (dp - delta)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T do

The scale multiplies the float32 sums at the very end; the products see the stored q and k, never a rounded scale * k.
`backward_rows` prepares lse_2 and delta per row, padded with lse_2 = +inf, which makes p = 0 on padded and empty rows
without a mask in the loops.

Where logits are large, ds is a small difference of large terms. Two roundings are therefore taken back: that of out to
16 bits, which delta would inherit (`out_rest`), and, for float32 only (EXACT), that of the log-sum-exp, whose error is
one factor per row: p is divided by its own row sum, and the exponent is taken of s - lse / scale, which is exact where
p counts.

Shape legend: see forward.py. visitors / start: see `inverse_lists`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_forcing.kernels.block_sparse_attention.gpu.tiles import (
    LOG2E,
    block_descriptor,
    load_block,
    store_block,
    tile_mask,
    tile_offsets,
)
from sparse_forcing.kernels.triton_runtime import program_head

CHANGING = ["query_blocks", "slots", "list_length", "visits"]


@triton.jit(do_not_specialize=CHANGING)
def backward_rows(
    grad_out, out, out_rest, grad_lse, lse, query_sizes, lse_rows, delta_rows, scale, query_blocks,
    Tq: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, REST: tl.constexpr, LSE_GRADIENT: tl.constexpr, EXACT: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """lse_rows (EXACT: lse / scale), delta_rows [B*H, Nq, ROWS] float32, rows Tq.. padded; BLOCK_Q rows a program.

    grad_out, out, out_rest [B*H, Nq, Tq, D], contiguous. REST: out + out_rest is the output before it was rounded.
    """
    PARTS: tl.constexpr = ROWS // BLOCK_Q
    head, block, part = program_head(MANY_HEADS), tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    which = head * query_blocks + block
    rows, dims = part * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq
    real = tile_mask(rows, query_size, dims, D, Tq, BLOCK_D, RAGGED_Q)
    place = which * Tq * D + tile_offsets(rows, dims, D, 1)
    o = tl.load(out + place, mask=real, other=0.0).to(tl.float32)
    if REST:
        o += tl.load(out_rest + place, mask=real, other=0.0).to(tl.float32)
    do = tl.load(grad_out + place, mask=real, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + which * Tq + rows, mask=rows < tl.minimum(query_size, Tq), other=float("-inf"))
    seen = row_lse != float("-inf")  # NaN, where a row saw it, goes on
    delta = tl.sum(o * do, 1)
    if LSE_GRADIENT:
        delta -= tl.load(grad_lse + which * Tq + rows, mask=seen, other=0.0)
    row_lse = row_lse / scale if EXACT else row_lse * LOG2E
    tl.store(lse_rows + which * ROWS + rows, tl.where(seen, row_lse, float("inf")))
    tl.store(delta_rows + which * ROWS + rows, tl.where(seen, delta, 0.0))


@triton.jit
def _probability(scores, lse, scale_log2, EXACT: tl.constexpr):
    """p from scores and what `backward_rows` made of the log-sum-exp, broadcast; EXACT: up to a factor per row."""
    if EXACT:
        return tl.math.exp2((scores - lse) * scale_log2)
    else:
        return tl.math.exp2(scores * scale_log2 - lse)


@triton.jit
def _dq_step(
    q, k, v, do, lse, delta, dq, total, scale_log2, columns, size,
    MASK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq += ds k for one key block; masked columns get p = 0 (their k is 0, but 2^-lse could overflow to inf).

    EXACT also sums p over keys into total.
    """
    p = _probability(tl.dot(q, tl.trans(k), input_precision=PRECISION), lse[:, None], scale_log2, EXACT)
    if MASK:
        p = tl.where(columns[None, :] < size, p, 0.0)
    if EXACT:
        total += tl.sum(p, 1)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), total


@triton.jit
def _dkdv_step(k, v, q, do, lse, delta, share, dk, dv, scale_log2, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """dv += p^T do, dk += ds^T q for one query block, all transposed so that the sums run over the inner dimension.

    No mask on the keys: a key row only ever feeds its own gradient row, so padding is cleared once, at the end.
    """
    p = _probability(tl.dot(k, tl.trans(q), input_precision=PRECISION), lse[None, :], scale_log2, EXACT)
    if EXACT:
        p = p * share[None, :]
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=CHANGING)
def backward_dq_pointer(
    query, key_pool, value_pool, grad_out, lse_rows, delta_rows, share_rows, grad_query, block_index, counts,
    query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale, scale_log2, heads, query_blocks, slots, list_length,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """grad_query of BLOCK_Q rows of a query block over the forward list.

    share_rows [B*H, Nq, ROWS] (EXACT only) receives 1 / the row sum of what `_probability` gives.
    """
    Q_PARTS: tl.constexpr = (Tq + BLOCK_Q - 1) // BLOCK_Q
    K_PARTS: tl.constexpr = (T + BLOCK_K - 1) // BLOCK_K
    head, block, part = program_head(MANY_HEADS), tl.program_id(0) // Q_PARTS, tl.program_id(0) % Q_PARTS
    batch, of_batch = head // heads, head % heads
    rows, dims = part * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    which = head * query_blocks + block
    query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq
    real = tile_mask(rows, query_size, dims, D, Tq, BLOCK_D, RAGGED_Q)
    base = query + batch * sqb + of_batch * sqh + block.to(tl.int64) * sqn
    q = tl.load(base + tile_offsets(rows, dims, sqt, sqd), mask=real, other=0.0)
    do = tl.load(grad_out + which * Tq * D + tile_offsets(rows, dims, D, 1), mask=real, other=0.0)
    lse = tl.load(lse_rows + which * ROWS + rows)
    delta = tl.load(delta_rows + which * ROWS + rows)
    part_columns = tl.arange(0, BLOCK_K)
    k_tile = key_pool + batch * skb + of_batch * skh + tile_offsets(part_columns, dims, skt, skd)
    v_tile = value_pool + batch * svb + of_batch * svh + tile_offsets(part_columns, dims, svt, svd)

    dq = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    entry = block_index + which * list_length
    for i in tl.range(0, tl.load(counts + which) * K_PARTS):
        slot = tl.load(entry + i // K_PARTS).to(tl.int64)
        first = (i % K_PARTS) * BLOCK_K
        columns = first + part_columns
        size = tl.load(key_sizes + head * slots + slot) if RAGGED_K else T
        token = tile_mask(columns, size, dims, D, T, BLOCK_D, RAGGED_K)
        k = tl.load(k_tile + (slot * sks + first * skt), mask=token, other=0.0)
        v = tl.load(v_tile + (slot * svs + first * svt), mask=token, other=0.0)
        dq, total = _dq_step(
            q,
            k,
            v,
            do,
            lse,
            delta,
            dq,
            total,
            scale_log2,
            columns,
            size,
            RAGGED_K or T % BLOCK_K != 0,
            PRECISION,
            EXACT,
        )
    if EXACT:
        share = 1.0 / tl.where(total > 0, total, 1.0)
        tl.store(share_rows + which * ROWS + rows, share)
        dq *= share[:, None]
    inside = tile_mask(rows, Tq, dims, D, Tq, BLOCK_D, False)
    grad = (dq * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + which * Tq * D + tile_offsets(rows, dims, D, 1), grad, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def backward_dq_tma(
    query, key_pool, value_pool, grad_out, lse_rows, delta_rows, share_rows, grad_query, block_index, counts,
    query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale, scale_log2, heads, query_blocks, slots, list_length,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """`backward_dq_pointer` with every tile moved by TMA; not for ragged keys (see `forward_tma`).

    Padded query rows may hold anything here: they meet p = 0 and an `lse` of +inf, and are cleared before the store.
    """
    tl.static_assert(not RAGGED_K and not EXACT)
    head, block = program_head(MANY_HEADS), tl.program_id(0)
    batch, of_batch = head // heads, head % heads
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    which = head * query_blocks + block
    q_blocks = block_descriptor(query + batch * sqb + of_batch * sqh, query_blocks, sqn, sqt, Tq, D, BLOCK_Q, BLOCK_D)
    k_blocks = block_descriptor(key_pool + batch * skb + of_batch * skh, slots, sks, skt, T, D, BLOCK_K, BLOCK_D)
    v_blocks = block_descriptor(value_pool + batch * svb + of_batch * svh, slots, svs, svt, T, D, BLOCK_K, BLOCK_D)
    start = head * query_blocks * Tq * D
    do_blocks = block_descriptor(grad_out + start, query_blocks, Tq * D, D, Tq, D, BLOCK_Q, BLOCK_D)
    dq_blocks = block_descriptor(grad_query + start, query_blocks, Tq * D, D, Tq, D, BLOCK_Q, BLOCK_D)

    q = load_block(q_blocks, block, Tq, BLOCK_Q, BLOCK_D)
    do = load_block(do_blocks, block, Tq, BLOCK_Q, BLOCK_D)
    lse = tl.load(lse_rows + which * ROWS + rows)
    delta = tl.load(delta_rows + which * ROWS + rows)
    dq = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    entry = block_index + which * list_length
    for i in tl.range(0, tl.load(counts + which)):
        slot = tl.load(entry + i)
        k = load_block(k_blocks, slot, T, BLOCK_K, BLOCK_D)
        v = load_block(v_blocks, slot, T, BLOCK_K, BLOCK_D)
        dq, _ = _dq_step(q, k, v, do, lse, delta, dq, 0, scale_log2, columns, T, T != BLOCK_K, PRECISION, False)
    dq = tl.where((lse != float("inf"))[:, None], dq * scale, 0.0)
    store_block(dq_blocks, block, dq.to(grad_query.dtype.element_ty), Tq, BLOCK_Q, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def backward_dkdv_pointer(
    query, key_pool, value_pool, grad_out, lse_rows, delta_rows, share_rows, grad_key, grad_value, start, visitors,
    query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale, scale_log2, heads, query_blocks, slots, visits,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value of BLOCK_K tokens of a slot over its visitors."""
    Q_PARTS: tl.constexpr = (Tq + BLOCK_Q - 1) // BLOCK_Q
    K_PARTS: tl.constexpr = (T + BLOCK_K - 1) // BLOCK_K
    head, slot, part = program_head(MANY_HEADS), tl.program_id(0) // K_PARTS, tl.program_id(0) % K_PARTS
    batch, of_batch = head // heads, head % heads
    columns, dims = part * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    size = tl.load(key_sizes + head * slots + slot) if RAGGED_K else T
    token = tile_mask(columns, size, dims, D, T, BLOCK_D, RAGGED_K)
    far = slot.to(tl.int64)
    k_base = key_pool + batch * skb + of_batch * skh + far * sks
    v_base = value_pool + batch * svb + of_batch * svh + far * svs
    k = tl.load(k_base + tile_offsets(columns, dims, skt, skd), mask=token, other=0.0)
    v = tl.load(v_base + tile_offsets(columns, dims, svt, svd), mask=token, other=0.0)
    part_rows = tl.arange(0, BLOCK_Q)
    q_tile = query + batch * sqb + of_batch * sqh + tile_offsets(part_rows, dims, sqt, sqd)
    do_tile = grad_out + head * query_blocks * Tq * D + tile_offsets(part_rows, dims, D, 1)

    dk = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    edge = start + head * (slots + 1) + slot
    for i in tl.range(tl.load(edge) * Q_PARTS, tl.load(edge + 1) * Q_PARTS):
        block = tl.load(visitors + head * visits + i // Q_PARTS).to(tl.int64)
        first = (i % Q_PARTS) * BLOCK_Q
        rows = first + part_rows
        query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq
        real = tile_mask(rows, query_size, dims, D, Tq, BLOCK_D, RAGGED_Q)
        q = tl.load(q_tile + (block * sqn + first * sqt), mask=real, other=0.0)
        do = tl.load(do_tile + (block * Tq + first) * D, mask=real, other=0.0)
        row = (head * query_blocks + block) * ROWS + rows
        lse, delta = tl.load(lse_rows + row), tl.load(delta_rows + row)
        share = tl.load(share_rows + row, mask=rows < Tq, other=0.0) if EXACT else 0
        dk, dv = _dkdv_step(k, v, q, do, lse, delta, share, dk, dv, scale_log2, PRECISION, EXACT)
    kept = (columns < size)[:, None]
    inside = tile_mask(columns, T, dims, D, T, BLOCK_D, False)
    place = (head * slots + slot) * T * D + tile_offsets(columns, dims, D, 1)
    tl.store(grad_key + place, tl.where(kept, dk * scale, 0.0).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, tl.where(kept, dv, 0.0).to(grad_value.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def backward_dkdv_tma(
    query, key_pool, value_pool, grad_out, lse_rows, delta_rows, share_rows, grad_key, grad_value, start, visitors,
    query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale, scale_log2, heads, query_blocks, slots, visits,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """`backward_dkdv_pointer` with every tile moved by TMA; not for ragged queries: p = 0 meets their padding here.

    Ragged keys are fine: whatever a padded key holds stays in its own rows, which are cleared before the store.
    """
    tl.static_assert(not RAGGED_Q and not EXACT)
    head, slot = program_head(MANY_HEADS), tl.program_id(0)
    batch, of_batch = head // heads, head % heads
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_blocks = block_descriptor(query + batch * sqb + of_batch * sqh, query_blocks, sqn, sqt, Tq, D, BLOCK_Q, BLOCK_D)
    k_blocks = block_descriptor(key_pool + batch * skb + of_batch * skh, slots, sks, skt, T, D, BLOCK_K, BLOCK_D)
    v_blocks = block_descriptor(value_pool + batch * svb + of_batch * svh, slots, svs, svt, T, D, BLOCK_K, BLOCK_D)
    q_start, k_start = head * query_blocks * Tq * D, head * slots * T * D
    do_blocks = block_descriptor(grad_out + q_start, query_blocks, Tq * D, D, Tq, D, BLOCK_Q, BLOCK_D)
    dk_blocks = block_descriptor(grad_key + k_start, slots, T * D, D, T, D, BLOCK_K, BLOCK_D)
    dv_blocks = block_descriptor(grad_value + k_start, slots, T * D, D, T, D, BLOCK_K, BLOCK_D)

    k = load_block(k_blocks, slot, T, BLOCK_K, BLOCK_D)
    v = load_block(v_blocks, slot, T, BLOCK_K, BLOCK_D)
    dk = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    edge = start + head * (slots + 1) + slot
    lse_tile = lse_rows + head * query_blocks * ROWS + rows
    delta_tile = delta_rows + head * query_blocks * ROWS + rows
    for i in tl.range(tl.load(edge), tl.load(edge + 1)):
        block = tl.load(visitors + head * visits + i)
        q = load_block(q_blocks, block, Tq, BLOCK_Q, BLOCK_D)
        do = load_block(do_blocks, block, Tq, BLOCK_Q, BLOCK_D)
        lse, delta = tl.load(lse_tile + block * ROWS), tl.load(delta_tile + block * ROWS)
        dk, dv = _dkdv_step(k, v, q, do, lse, delta, 0, dk, dv, scale_log2, PRECISION, False)
    size = tl.load(key_sizes + head * slots + slot) if RAGGED_K else T
    kept = (columns < size)[:, None]
    store_block(dk_blocks, slot, tl.where(kept, dk * scale, 0.0).to(grad_key.dtype.element_ty), T, BLOCK_K, BLOCK_D)
    store_block(dv_blocks, slot, tl.where(kept, dv, 0.0).to(grad_value.dtype.element_ty), T, BLOCK_K, BLOCK_D)
