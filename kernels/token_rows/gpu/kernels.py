"""Kernels of the row operations: a program holds a whole row in registers, reads it once and writes it once.

Legend: B batch, L tokens, C channels, H heads, D head dim, P pairs of a head that turn with time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_forcing.kernels.triton_runtime import program_head


@triton.jit(do_not_specialize=["tokens"])
def norm_rotate_kernel(
    x, weight, cos, sin, out, eps, tokens, sxb, sxl,
    C: tl.constexpr, PAIRS: tl.constexpr, BLOCK_C: tl.constexpr, MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """out [B, L, C] of one row: RMS norm over C times weight [C], then its interleaved pairs turned by cos and sin
    [L, PAIRS], each head alike. Sums and angles in float32, rounded once."""
    batch, token = program_head(MANY_HEADS), tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    row = tl.load(x + batch * sxb + token * sxl + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / C + eps) * factor
    even, odd = tl.split(tl.reshape(row, [BLOCK_C // 2, 2]))
    pair = tl.arange(0, BLOCK_C // 2)
    angle = token * PAIRS + pair % PAIRS
    c = tl.load(cos + angle, mask=pair < C // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < C // 2, other=0.0).to(tl.float32)
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_C])
    tl.store(out + (batch * tokens + token) * C + columns, turned, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def add_norm_kernel(
    x, update, gate, shift, scale, y, h, eps, tokens, sxb, sxl, sub, sul, sgate, sshift, sscale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, GATED: tl.constexpr, MODULATES: tl.constexpr, MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """y = x + update * gate and h = layer norm of y * scale + shift, one row [C]; vectors per sample by their strides.

    h is made of y before it is rounded: one rounding less than the plain calls have.
    """
    batch, token = program_head(MANY_HEADS), tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    added = tl.load(update + batch * sub + token * sul + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        added *= tl.load(gate + batch * sgate + columns, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(x + batch * sxb + token * sxl + columns, mask=inside, other=0.0).to(tl.float32) + added
    place = (batch * tokens + token) * C + columns
    tl.store(y + place, row, mask=inside)
    centred = tl.where(inside, row - tl.sum(row, 0) / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    factor = tl.load(scale + batch * sscale + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATES:
        factor += 1.0
    offset = tl.load(shift + batch * sshift + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + place, normed * factor + offset, mask=inside)


@triton.jit(do_not_specialize=["inner", "rows"])
def turn_time_kernel(
    keys, cos, sin, inner, rows, ska, skb, skc, sta, stb, stc,
    PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr, MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """Turn the first PAIRS pairs of ROWS keys, in place, by cos and sin.

    keys [A, B, C, D], cos and sin [A, B, C, PAIRS] by their strides (0 where several keys share a turn); a program has
    rows of one A, `rows` = B * C of them and `inner` = C.
    """
    a = program_head(MANY_HEADS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32 bits: a division of 64 is a call
    b, c = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    listed = (row < rows)[:, None] & (pair < PAIRS)[None, :]
    turn = (a * sta + b * stb + c * stc)[:, None] + pair[None, :]
    x, y = tl.load(cos + turn, mask=listed, other=0.0), tl.load(sin + turn, mask=listed, other=0.0)
    place = keys + (a * ska + b * skb + c * skc)[:, None] + 2 * pair[None, :]
    even = tl.load(place, mask=listed, other=0.0).to(tl.float32)
    odd = tl.load(place + 1, mask=listed, other=0.0).to(tl.float32)
    tl.store(place, even * x - odd * y, mask=listed)
    tl.store(place + 1, even * y + odd * x, mask=listed)
