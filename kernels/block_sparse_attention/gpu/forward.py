"""Forward kernels: out = softmax over the listed slots, log-sum-exp per row, and the ingredients of block mass.

    forward_pointer   any layout, any head dim, ragged sizes: Ampere, Ada, AMD, float32, and every fallback
    forward_tma       Hopper and later, one query block per program, blocks fetched by the bulk copy engine (TMA)

Both walk one list per program over one pool: a persistent block and a selected window block differ only in their slot.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S slots, T tokens per slot, D head dim,
M list entries per query block. Strides are named s<tensor><dimension>; counts [B, H, Nq] is the length of each list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_forcing.kernels.block_sparse_attention.gpu.tiles import (
    LOWEST,
    add_values,
    block_descriptor,
    finish_softmax,
    load_block,
    online_softmax,
    rounding_rest,
    store_block,
    tile_mask,
    tile_offsets,
)
from sparse_forcing.kernels.triton_runtime import program_head

CHANGING = ["query_blocks", "slots", "list_length"]  # integers that change from chunk to chunk: one compilation for all


@triton.jit(do_not_specialize=CHANGING)
def forward_pointer(
    query, key_pool, value_pool, out, out_rest, lse, row_mass, block_index, counts, query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale_log2, heads, query_blocks, slots, list_length,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, MASS: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of a query block against its list.

    Blocks larger than a tile are visited in parts, query rows by as many programs, keys by as many iterations.
    Padding is masked at the load, so it may hold anything, NaN included. row_mass [B*H, Nq, M * parts, 2, ROWS] (MASS
    only) receives m and sum_c p of every visited part; `block_mass` turns them into attention mass once lse is known.
    out_rest (REST only): what out lost to its type, for the backward, see `backward_rows`.

    HALVES adds up the left and the right half of out apart. For 64 rows and 128 columns Triton spreads the columns over
    the warps of an Ampere-style tensor core, which sends every row maximum and sum through shared memory; for 64
    columns it spreads the rows: 522 instead of 682 issue slots per pair on sm_80, 503 instead of 648 on sm_120.
    """
    WIDTH: tl.constexpr = BLOCK_D // 2 if HALVES else BLOCK_D
    Q_PARTS: tl.constexpr = (Tq + BLOCK_Q - 1) // BLOCK_Q
    K_PARTS: tl.constexpr = (T + BLOCK_K - 1) // BLOCK_K
    head, block, part = program_head(MANY_HEADS), tl.program_id(0) // Q_PARTS, tl.program_id(0) % Q_PARTS
    batch, of_batch = head // heads, head % heads
    rows, dims = part * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    left = tl.arange(0, WIDTH)
    right = WIDTH + left
    query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq

    base = query + batch * sqb + of_batch * sqh + block.to(tl.int64) * sqn
    real = tile_mask(rows, query_size, dims, D, Tq, BLOCK_D, RAGGED_Q)
    q = tl.load(base + tile_offsets(rows, dims, sqt, sqd), mask=real, other=0.0)
    part_columns = tl.arange(0, BLOCK_K)
    k_tile = key_pool + batch * skb + of_batch * skh + tile_offsets(part_columns, dims, skt, skd)
    values = value_pool + batch * svb + of_batch * svh
    v_tile = values + tile_offsets(part_columns, left, svt, svd)

    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([BLOCK_Q, WIDTH], 0.0, tl.float32)
    acc_right = tl.full([BLOCK_Q, WIDTH], 0.0, tl.float32)
    entry = block_index + (head * query_blocks + block) * list_length
    count = tl.load(counts + head * query_blocks + block)
    for i in tl.range(0, count * K_PARTS):
        slot = tl.load(entry + i // K_PARTS).to(tl.int64)
        first = (i % K_PARTS) * BLOCK_K
        columns = first + part_columns
        size = tl.load(key_sizes + head * slots + slot) if RAGGED_K else T
        token = tile_mask(columns, size, dims, D, T, BLOCK_D, RAGGED_K)
        k = tl.load(k_tile + (slot * sks + first * skt), mask=token, other=0.0)
        token = tile_mask(columns, size, left, D, T, WIDTH, RAGGED_K)
        v = tl.load(v_tile + (slot * svs + first * svt), mask=token, other=0.0)
        m, total, p, shrink, block_total = online_softmax(
            q, k, m, total, scale_log2, columns, size, RAGGED_K or T % BLOCK_K != 0, PRECISION
        )
        acc = add_values(acc, p, shrink, v, PRECISION)
        if HALVES:
            token = tile_mask(columns, size, right, D, T, WIDTH, RAGGED_K)
            v = tl.load(values + slot * svs + tile_offsets(columns, right, svt, svd), mask=token, other=0.0)
            acc_right = add_values(acc_right, p, shrink, v, PRECISION)
        if MASS:
            visited = ((head * query_blocks + block) * list_length * K_PARTS + i) * (2 * ROWS)
            tl.store(row_mass + visited + rows, m)
            tl.store(row_mass + visited + ROWS + rows, block_total)

    start = (head * query_blocks + block) * Tq
    o, row_lse = finish_softmax(m, total, acc, rows < query_size)
    tl.store(lse + start + rows, row_lse, mask=rows < Tq)
    place = start * D + tile_offsets(rows, left, D, 1)
    inside = tile_mask(rows, Tq, left, D, Tq, WIDTH, False)
    tl.store(out + place, o.to(out.dtype.element_ty), mask=inside)
    if REST:
        tl.store(out_rest + place, rounding_rest(o, out), mask=inside)
    if HALVES:
        o, _ = finish_softmax(m, total, acc_right, rows < query_size)
        place = start * D + tile_offsets(rows, right, D, 1)
        inside = tile_mask(rows, Tq, right, D, Tq, WIDTH, False)
        tl.store(out + place, o.to(out.dtype.element_ty), mask=inside)
        if REST:
            tl.store(out_rest + place, rounding_rest(o, out), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def forward_tma(
    query, key_pool, value_pool, out, out_rest, lse, row_mass, block_index, counts, query_sizes, key_sizes,
    sqb, sqh, sqn, sqt, sqd, skb, skh, sks, skt, skd, svb, svh, svs, svt, svd,
    scale_log2, heads, query_blocks, slots, list_length,
    Tq: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, MASS: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """`forward_pointer` with every tile moved by TMA: no address arithmetic and 46 fewer registers in the loop.

    Needs unit stride and 16-byte alignment, and finite key padding (RAGGED_K is refused by the launch table: the copy
    engine cannot leave out stored tokens, and 0 * NaN is NaN). T < BLOCK_K is masked with a constant, which costs 7
    instructions per block where a runtime size costs 56. `v` is fetched together with `k`: asking for it only after
    the softmax costs 8 more.
    """
    tl.static_assert(not RAGGED_K)
    head, block = program_head(MANY_HEADS), tl.program_id(0)
    batch, of_batch = head // heads, head % heads
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_blocks = block_descriptor(query + batch * sqb + of_batch * sqh, query_blocks, sqn, sqt, Tq, D, BLOCK_Q, BLOCK_D)
    k_blocks = block_descriptor(key_pool + batch * skb + of_batch * skh, slots, sks, skt, T, D, BLOCK_K, BLOCK_D)
    v_blocks = block_descriptor(value_pool + batch * svb + of_batch * svh, slots, svs, svt, T, D, BLOCK_K, BLOCK_D)
    o_head = out + head * query_blocks * Tq * D
    o_blocks = block_descriptor(o_head, query_blocks, Tq * D, D, Tq, D, BLOCK_Q, BLOCK_D)

    q = load_block(q_blocks, block, Tq, BLOCK_Q, BLOCK_D)
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    entry = block_index + (head * query_blocks + block) * list_length
    count = tl.load(counts + head * query_blocks + block)
    for i in tl.range(0, count):
        slot = tl.load(entry + i)
        k = load_block(k_blocks, slot, T, BLOCK_K, BLOCK_D)
        v = load_block(v_blocks, slot, T, BLOCK_K, BLOCK_D)
        m, total, p, shrink, block_total = online_softmax(
            q, k, m, total, scale_log2, columns, T, T != BLOCK_K, PRECISION
        )
        acc = add_values(acc, p, shrink, v, PRECISION)
        if MASS:
            visited = row_mass + ((head * query_blocks + block) * list_length + i) * (2 * ROWS)
            tl.store(visited + rows, m)
            tl.store(visited + ROWS + rows, block_total)

    query_size = tl.load(query_sizes + block) if RAGGED_Q else Tq
    o, row_lse = finish_softmax(m, total, acc, rows < query_size)
    tl.store(lse + (head * query_blocks + block) * Tq + rows, row_lse, mask=rows < Tq)
    store_block(o_blocks, block, o.to(out.dtype.element_ty), Tq, BLOCK_Q, BLOCK_D)
    if REST:
        r_head = out_rest + head * query_blocks * Tq * D
        r_blocks = block_descriptor(r_head, query_blocks, Tq * D, D, Tq, D, BLOCK_Q, BLOCK_D)
        store_block(r_blocks, block, rounding_rest(o, out), Tq, BLOCK_Q, BLOCK_D)
