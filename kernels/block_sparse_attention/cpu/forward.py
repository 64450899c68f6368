"""The forward of the CPU backend: base-2 softmax over pieces, with running maxima only where they are needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.arithmetic import (
    LOG2E,
    SAFE_SUM,
    add_product,
    base2_scores,
    cut_pieces,
    flat_rows,
    product_dtype,
    work_dtype,
)
from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import BlockTable, Cut, Lists
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

LOWEST = -1e30  # running maximum of an empty row: finite, so that -inf - LOWEST stays -inf instead of NaN


def forward(
    problem: Problem, lists: Lists, padding: Tensor | None, return_mass: bool, keep_rest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, mass, out_rest) as in ops.py; padding [B * H * Nq, Tq] marks padded rows."""
    query, scale = problem.query, problem.scale
    entries = lists.slots.shape[1]
    rows = _ForwardRows(flat_rows(query, padding, query.dtype, "cleared queries"), entries if return_mass else 0)
    cuts = cut_pieces(query, lists.tokens, entries, problem.num_persistent, buffers=1)
    tables = BlockTable(problem.key_pool, lists), BlockTable(problem.value_pool, lists)
    if not _accumulate(rows, cuts, *tables, lists, scale):
        rows.subtract_peaks()
        _accumulate(rows, cuts, *tables, lists, scale)

    lse2 = rows.lse2()
    if lists.sizes is not None:
        rows.total.masked_fill_(rows.total == 0, 1)
    exact = rows.acc.div_(rows.total.unsqueeze(-1))
    if padding is not None:
        exact.masked_fill_(padding.unsqueeze(-1), 0)
        lse2.masked_fill_(padding, float("-inf"))
    mass = rows.mass(lse2).unflatten(0, query.shape[:3])
    out = exact.view(query.shape).to(query.dtype)
    shape = rest_shape(query, keep_rest)
    rest = exact.sub_(out.flatten(0, 2)).to(query.dtype).view(shape) if math.prod(shape) else query.new_empty(shape)
    return out, lse2.div_(LOG2E).view(query.shape[:-1]), mass, rest


def _accumulate(
    rows: _ForwardRows, cuts: list[Cut], keys: BlockTable, values: BlockTable, lists: Lists, scale: float
) -> bool:
    """Sum the weights of all pieces, and the values by them. False where running maxima are needed: known after the
    first piece at best, after the last at worst."""
    stored = Buffer.of("stored keys", rows.q.dtype)  # values overwrite keys: half the cache
    q_buffer, k_buffer, s_buffer = (Buffer.of(purpose, rows.work) for purpose in ("queries", "keys", "scores"))
    product = product_dtype(rows.q)
    v_buffer, p_buffer, pv_buffer = (
        Buffer.of(purpose, product) for purpose in ("product values", "product scores", "products")
    )
    visited = 0
    for cut in cuts:
        pieces = zip(rows.pieces(cut), cut.flat_lists(keys.rows), cut.flat_lists(values.rows), lists.find_padding(cut))
        for row, key_rows, value_rows, padded in pieces:
            items = row.q.shape[0]
            k = k_buffer.hold(keys.gather(key_rows, items, stored))
            s = base2_scores(s_buffer, k, q_buffer.hold(row.q).mT, scale, padded)
            p, decay = _weigh(s, row, padded is not None)
            if visited == 0 and not rows.safe(row.total):
                return False
            visited += 1
            if decay is not None:
                row.acc.mul_(decay.unsqueeze(-1))
            # Padded values have weight 0, but 0 * NaN is NaN: gather clears them.
            v = v_buffer.hold(values.gather(value_rows, items, stored, padded))
            add_product(row.acc, p_buffer.hold(p).mT, v, pv_buffer, first=row.first)
    return visited == 1 or rows.safe(rows.total)


class _RowPiece(NamedTuple):
    """What a piece has of _ForwardRows: [n, R, D], [n, R], and of block masses [n, m, blocks of an item, Tq]."""

    first: bool  # no other piece has touched these rows yet
    q: Tensor
    acc: Tensor
    total: Tensor
    peak: Tensor | None
    block_sums: Tensor | None
    block_peaks: Tensor | None


class _ForwardRows:
    """Query rows [B * H * Nq, Tq, D], and of every row total = sum exp2(s - peak) and acc = sum exp2(s - peak) v.

    Any peak near the row's maximum gives the same digits. There is none (0) at first, which saves two passes over the
    scores: as long as the totals are in [1 / SAFE_SUM, SAFE_SUM]. Where they are not, all is summed again with running
    maxima. block_sums and block_peaks are the same of every listed block, if asked for.
    """

    def __init__(self, q: Tensor, mass_entries: int):
        self.q, self.work = q, work_dtype(q)
        # Of the output's type the sums become the output, otherwise they are scratch.
        self.acc = torch.empty_like(q) if q.dtype == self.work else Buffer.of("sums", self.work).view(*q.shape)
        self.total = self.acc.new_empty(q.shape[:2])
        self.peak: Tensor | None = None
        self.block_sums = self.acc.new_empty((len(q), mass_entries, q.shape[1])) if mass_entries else None
        self.block_peaks: Tensor | None = None

    def subtract_peaks(self) -> None:
        """From now on the running maximum is the peak."""
        self.peak = torch.empty_like(self.total)
        if self.block_sums is not None:
            self.block_peaks = torch.empty_like(self.block_sums)

    def pieces(self, cut: Cut) -> Iterator[_RowPiece]:
        """What every piece of a cut has of the rows."""
        nothing = itertools.repeat(None)
        peaks = nothing if self.peak is None else cut.rows(self.peak)
        block_sums = nothing if self.block_sums is None else cut.list_rows(self.block_sums)
        block_peaks = nothing if self.block_peaks is None else cut.list_rows(self.block_peaks)
        rows = (cut.rows(x) for x in (self.q, self.acc, self.total))
        return map(_RowPiece, cut.first(), *rows, peaks, block_sums, block_peaks)

    def safe(self, total: Tensor) -> bool:
        """Whether these totals are exact: with a peak they always are."""
        if self.peak is not None:
            return True
        least, most = (float(x) for x in total.aminmax())
        return 1 / SAFE_SUM < least and most < SAFE_SUM

    def lse2(self) -> Tensor:
        """Base-2 log-sum-exp [B * H * Nq, Tq]; -inf where a row saw nothing."""
        lse2 = self.total.log2()
        return lse2 if self.peak is None else lse2.add_(self.peak)

    def mass(self, lse2: Tensor) -> Tensor:
        """[B * H * Nq, M], by what was summed; rows with lse -inf (padded or empty) count nothing."""
        if self.block_sums is None:
            return lse2.new_empty((len(lse2), 0))
        lse2 = lse2.masked_fill(lse2 == float("-inf"), float("inf")).unsqueeze(1)
        exponent = -lse2 if self.block_peaks is None else self.block_peaks.sub_(lse2)
        return self.block_sums.mul_(exponent.exp2_()).sum(-1)


def _weigh(s: Tensor, row: _RowPiece, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Weights [n, L, R] of a piece, in the place of its scores, counted in the totals of its rows, and the factor
    [n, R] on what was accumulated before."""
    decay = None
    if row.peak is not None:
        decay = _raise_peak(s, row.peak, row.first)
        if padded:
            row.peak.clamp_(min=LOWEST)
        s.sub_(row.peak.unsqueeze(1))
    if row.first:
        torch.sum(s.exp2_(), 1, out=row.total)
    else:
        if decay is not None:
            row.total.mul_(decay)
        row.total.add_(s.exp2_().sum(1))
    if row.block_sums is not None:
        row.block_sums.copy_(s.unflatten(1, (row.block_sums.shape[1], -1)).sum(2).view_as(row.block_sums))
    if row.block_peaks is not None and row.peak is not None:
        row.block_peaks.copy_(row.peak.unflatten(1, row.block_peaks.shape[2:]).unsqueeze(1))
    return s, decay


def _raise_peak(s: Tensor, peak: Tensor, first: bool) -> Tensor | None:
    """Raise peak [n, R] to the maximum of s [n, L, R] over keys; factor on what was accumulated, None at first."""
    n, L, R = s.shape
    lanes = math.gcd(L, 32 // math.gcd(R, 32))  # torch reduces whole vectors of columns fast, odd ones one by one
    if lanes > 1:
        s = s.view(n, L // lanes, lanes * R).amax(1).view(n, lanes, R)
    if first:
        torch.amax(s, 1, out=peak)
        return None
    old = peak.clone()
    torch.maximum(old, s.amax(1), out=peak)
    return old.sub_(peak).exp2_()
