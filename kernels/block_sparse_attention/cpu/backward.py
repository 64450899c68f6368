"""The backward of the CPU backend: probabilities again, piece by piece, and the three gradients from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.arithmetic import (
    LOG2E,
    add_product,
    base2_scores,
    cut_pieces,
    flat_rows,
    product_dtype,
    work_dtype,
)
from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import BlockTable, Cut, Lists
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

GROUP_BYTES = 4 << 20  # float32 sums of the gradients of a group of heads, for types narrower than that


def backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, out_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py. Where sums are wider than the gradients, heads go in groups: fresh pages cost more than the GEMMs."""
    query, scale = problem.query, problem.scale

    def of(group: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
        dlse = None if grad_lse is None else grad_lse[group]
        rest = out_rest[group] if out_rest.numel() else None
        rows = _BackwardRows(grad_out[group], dlse, query[group], out[group], rest, lse[group], scale)
        return _backward_heads(rows, problem.of_heads(group))

    if query.dtype == work_dtype(query):
        return of((slice(None), slice(None)))
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in problem.inputs)
    for group in _head_groups(problem.key_pool):
        dq[group], dk[group], dv[group] = of(group)
    return dq, dk, dv


def _backward_heads(rows: _BackwardRows, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the working type: p = exp(s - lse) again, piece by piece; ds = p (dp - delta),
    delta = <dout, out> - dlse."""
    query, key_pool, value_pool, block_index, _, key_sizes, scale, num_persistent = problem
    B, H, S, T, D = key_pool.shape
    lists = Lists(block_index, key_sizes, T)
    keys, values = BlockTable(key_pool, lists), BlockTable(value_pool, lists)
    targets = lists.table_rows((H * S, S))
    work, product = work_dtype(query), product_dtype(query)
    dq = torch.zeros(rows.q.shape, dtype=work)
    dk, dv = (torch.zeros((B * H * S, T * D), dtype=work) for _ in range(2))
    k_stored, v_stored = (Buffer.of(purpose, query.dtype) for purpose in ("stored keys", "stored values"))
    k_buffer, v_buffer = (Buffer.of(purpose, work) for purpose in ("keys", "values"))
    p_buffer, ds_buffer = (Buffer.of(purpose, work) for purpose in ("scores", "ds"))
    px_buffer, dsx_buffer, dq_buffer = (
        Buffer.of(purpose, product) for purpose in ("product scores", "product ds", "products")
    )
    # Where the products for dk and dv go: over the gathered blocks, which are no longer needed by then.
    dk_buffer, dv_buffer = (k_stored, v_stored) if product == query.dtype else (k_buffer, v_buffer)

    for cut in cut_pieces(query, T, block_index.shape[-1], num_persistent, buffers=2):
        slots = zip(*(cut.flat_lists(x) for x in (keys.rows, values.rows, targets)), lists.find_padding(cut))
        for row, dq_p, (key_rows, value_rows, target_rows, padded) in zip(rows.pieces(cut), cut.rows(dq), slots):
            items = row.q.shape[0]
            kx, vx = keys.gather(key_rows, items, k_stored, padded), values.gather(value_rows, items, v_stored, padded)
            k, v = k_buffer.hold(kx), v_buffer.hold(vx)
            p = base2_scores(p_buffer, k, row.work_q.mT, scale, padded)
            p.sub_(row.lse2.unsqueeze(1)).exp2_()
            dp = ds_buffer.bmm(v, row.work_do.mT, factor=scale)
            ds = dsx_buffer.hold(dp.sub_(row.delta.unsqueeze(1)).mul_(p))
            add_product(dq_p, ds.mT, kx if kx.dtype == product else k, dq_buffer, first=False)
            dk_p = k_buffer.hold(dk_buffer.bmm(ds, row.q))
            dk.index_add_(0, target_rows, dk_p.view(-1, T * D))
            dv_p = v_buffer.hold(dv_buffer.bmm(px_buffer.hold(p), row.do))
            dv.index_add_(0, target_rows, dv_p.view(-1, T * D))
    return dq.view(query.shape), dk.view(key_pool.shape), dv.view(key_pool.shape)


def _head_groups(pool: Tensor) -> Iterator[tuple[slice, slice]]:
    """(batch, heads) slices whose gradient sums take at most GROUP_BYTES, or one head."""
    B, H = pool.shape[:2]
    blocks = 2 * work_dtype(pool).itemsize * math.prod(pool.shape[2:])
    heads = min(H, max(1, GROUP_BYTES // blocks))
    batch = max(1, GROUP_BYTES // (H * blocks)) if heads == H else 1
    for b in range(0, B, batch):
        for h in range(0, H, heads):
            yield slice(b, b + batch), slice(h, h + heads)


class _BackwardPiece(NamedTuple):
    """What a piece has of _BackwardRows: [n, R, D] and [n, R]."""

    work_q: Tensor
    work_do: Tensor
    q: Tensor
    do: Tensor
    lse2: Tensor
    delta: Tensor


class _BackwardRows:
    """What the backward needs of every row, [B * H * Nq, Tq, ...]. The scale goes with dp, so that ds carries it.

    work_q, work_do: factors of the scores and of dp, in the working type; q, do: of the products for dk and dv.
    lse2, delta: base-2 log-sum-exp; scale (<dout, out> - dlse).
    """

    def __init__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        out: Tensor,
        out_rest: Tensor | None,
        lse: Tensor,
        scale: float,
    ):
        silent = lse.flatten(0, 2) == float("-inf")  # padded or empty rows: p = 0 and no gradient, whatever arrives
        drop = silent if bool(silent.any()) else None
        work, product = work_dtype(query), product_dtype(query)
        self.work_q = flat_rows(query, drop, work, "queries")
        self.work_do = flat_rows(grad_out, drop, work, "output gradients")
        self.q, self.do = self.work_q, self.work_do
        if product != work:
            self.q, self.do = (
                flat_rows(query, drop, product, "product queries"),
                flat_rows(grad_out, drop, product, "product dO"),
            )
        self.lse2 = lse.flatten(0, 2) * LOG2E
        exact = out.flatten(0, 2)
        if out_rest is not None:
            exact = exact.to(work).add_(out_rest.flatten(0, 2))
        self.delta = (self.work_do * exact).sum(-1)
        if grad_lse is not None:
            self.delta.sub_(grad_lse.flatten(0, 2))
        self.delta.mul_(scale)
        if drop is not None:
            self.lse2.masked_fill_(drop, float("inf"))
            self.delta.masked_fill_(drop, 0)

    def pieces(self, cut: Cut) -> Iterator[_BackwardPiece]:
        """What every piece of a cut has of the rows."""
        rows = (self.work_q, self.work_do, self.q, self.do, self.lse2, self.delta)
        return map(_BackwardPiece, *(cut.rows(x) for x in rows))
