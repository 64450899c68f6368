"""Small device functions that the attention kernels share: addressing, descriptors, one softmax step, storing.

Shape legend: R rows of a program (one query block, padded to a power of two), C columns (tokens of one pool slot,
padded), D head dim, padded to BLOCK_D.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # running maximum before the first real score: finite, so that m - m is 0 and never NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_offsets(rows, columns, row_stride, column_stride):
    """[R, C] element offsets of a tile. int64: a stride times a row may pass 2^31 before the tensor is full."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def tile_mask(rows, size, columns, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """[R, BLOCK_D] mask of real elements. With constants only (full tile, D a power of two) it folds away."""
    mask = (columns < D)[None, :] & (rows < ROWS)[:, None]
    if RAGGED:
        mask = mask & (rows < size)[:, None]
    return mask


@triton.jit
def block_descriptor(
    base, blocks, stride_block, stride_row, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Hopper TMA descriptor of one head's blocks [blocks, T, D], read one block [BLOCK, BLOCK_D] at a time.

    The third dimension makes T < BLOCK safe: the hardware zero-fills rows T.. of a load and drops them from a store,
    so a 60-token tile never reads or writes its neighbour. When T fills the box the two outer dimensions are one,
    which saves two instructions per load.
    """
    if T == BLOCK:
        return tl.make_tensor_descriptor(
            base, shape=[blocks * T, D], strides=[stride_row, 1], block_shape=[BLOCK, BLOCK_D]
        )
    else:
        return tl.make_tensor_descriptor(
            base, shape=[blocks, T, D], strides=[stride_block, stride_row, 1], block_shape=[1, BLOCK, BLOCK_D]
        )


@triton.jit
def load_block(descriptor, block, T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Block number `block` behind a `block_descriptor`, [BLOCK, BLOCK_D]."""
    if T == BLOCK:
        return descriptor.load([block * BLOCK, 0])
    else:
        return tl.reshape(descriptor.load([block, 0, 0]), [BLOCK, BLOCK_D])


@triton.jit
def store_block(descriptor, block, tile, T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK, BLOCK_D] as block number `block` behind a `block_descriptor`; rows T.. are dropped."""
    if T == BLOCK:
        descriptor.store([block * BLOCK, 0], tile)
    else:
        descriptor.store([block, 0, 0], tl.reshape(tile, [1, BLOCK, BLOCK_D]))


@triton.jit
def online_softmax(q, k, m, total, scale_log2, columns, size, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One key block of streaming softmax, in base 2 (exp2 is the hardware's exponential):

        s = q k^T,   m' = max(m, scale_log2 * max_c s),   p = 2^(scale_log2 * s - m'),   shrink = 2^(m - m')
        total' = shrink * total + sum_c p,   and for the caller   acc' = shrink * acc + p v

    q, k stay raw in the product and the scale multiplies the float32 result: rounding scale * k to bfloat16 first would
    make the gradients of large logits wrong. Returns (m', total', p, shrink, sum_c p).
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        scores = tl.where(columns[None, :] < size, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
    p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
    shrink = tl.math.exp2(m - m_new)
    block_total = tl.sum(p, 1)
    return m_new, total * shrink + block_total, p, shrink, block_total


@triton.jit
def add_values(acc, p, shrink, v, PRECISION: tl.constexpr):
    """acc' = shrink * acc + p v."""
    return tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)


@triton.jit
def finish_softmax(m, total, acc, valid):
    """(out rows, natural log-sum-exp): an empty or padded row gives 0 and -inf, one that saw NaN gives NaN."""
    seen = (total != 0) & valid
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)
    return out, tl.where(seen, (m + tl.math.log2(total)) * LN2, float("-inf"))


@triton.jit
def rounding_rest(tile, pointer):
    """[R, D] what float32 `tile` loses when it is stored behind `pointer`, in that type."""
    kind = pointer.dtype.element_ty
    return (tile - tile.to(kind).to(tl.float32)).to(kind)
