"""CPU backend: gather the listed blocks in cache-sized pieces, batched GEMMs, online softmax, flash-style backward.

Three decisions carry the speed (figures in README.md):

* Scores are computed key-major, s[n] = K[n] q[n]^T with shape [L, R]: every GEMM of the forward and of the backward
  then has the layout that MKL runs fastest with only R = 64 query rows, and reductions over keys run along vectors.
* A piece (some query blocks x some list entries) is a few MiB: small enough for the cache, large beside the cost of
  the torch calls that process it. Pieces of one query block are joined by an online softmax in (acc, peak, total).
* The persistent entries are the same for all query blocks of a head. They are visited by wide pieces, whose rows are
  many query blocks at once, so a gathered block serves hundreds of rows. Nothing else differs between the two kinds.

Softmax works in base 2: exp2 costs a third of exp here. The products of the scores carry the scale, so that queries are
used as they are. bfloat16 and float16 are computed in float32; only the factors of P V, P dO, dS K and dS Q are rounded
to bfloat16, for bfloat16 input, where oneDNN multiplies it fast. Where the CPU has matrix units, cpu_fused.py serves
what it can.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries; in a piece: n items, R rows each, m entries each, L = m * T keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention import cpu_fused
from sparse_forcing.kernels.block_sparse_attention.cpu_fused import has_matrix_units
from sparse_forcing.kernels.block_sparse_attention.cpu_pieces import (
    BlockTable,
    Buffer,
    Lists,
    Piece,
    cut_pieces,
    table_rows,
)
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape

PIECE_BYTES = 3 << 20  # blocks and scores of a piece, per thread: small in a last-level cache, large beside an op call
GROUP_BYTES = 4 << 20  # float32 sums of the gradients of a group of heads, for types narrower than that
SAFE_SUM = 2.0**60  # float32 and bfloat16 end at 2^127: room for values up to 1e19, and 66 binary digits below the sum
LOWEST = -1e30  # running maximum of an empty row: finite, so that -inf - LOWEST stays -inf instead of NaN
LOG2E = math.log2(math.e)


def why_unavailable(query: Tensor) -> str | None:
    """Reason why this backend cannot take the tensor, or None."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}, not on the CPU"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"{query.dtype} is not supported"
    return None


def forward(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
    num_persistent: int,
    return_mass: bool,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.py. Online softmax over pieces; `acc` holds sum exp2(s - peak) v."""
    B, H, Nq, _, _ = query.shape
    T, M = key_pool.shape[3], block_index.shape[-1]
    if not block_index.numel():
        return *_nothing_listed(query, M if return_mass else 0), query.new_zeros(rest_shape(query, keep_rest))
    padding, lists = _padded_rows(query_sizes, query), Lists(block_index, key_sizes, T)
    if _fused(query, lists) and not (return_mass or keep_rest):
        out, lse = cpu_fused.forward(query, key_pool, value_pool, lists, padding, scale, num_persistent)
        return out, lse, lse.new_zeros((B, H, Nq, 0)), query.new_zeros(rest_shape(query, False))
    q, work = _rows(query, padding, query.dtype, "cleared queries"), _work_dtype(query)
    keys, values = BlockTable(key_pool, lists), BlockTable(value_pool, lists)
    # Of the output's type the sums become the output, otherwise they are scratch.
    acc = torch.empty_like(q) if q.dtype == work else Buffer("sums", work).view(*q.shape)
    softmax, mass = _Softmax(acc), _Mass(acc, M) if return_mass else None
    stored = Buffer("stored keys", query.dtype)  # values overwrite keys: half the cache
    q_buffer, k_buffer, s_buffer = (Buffer(purpose, work) for purpose in ("queries", "keys", "scores"))
    v_buffer, p_buffer, pv_buffer = (
        Buffer(purpose, _product_dtype(query)) for purpose in ("product values", "product scores", "products")
    )

    for piece in _pieces(query, T, M, num_persistent, buffers=1):
        acc_p, padded = piece.rows(acc), lists.padded_keys(piece)
        k, q_p = k_buffer.hold(keys.gather(piece, stored)), q_buffer.hold(piece.rows(q))
        scores = functools.partial(_scores, s_buffer, k, q_p.mT, scale, padded)
        p, decay = softmax.weigh(piece, scores, padded is not None)
        if decay is not None:
            acc_p.mul_(decay.mT)
        # Padded values have weight 0, but 0 * NaN is NaN: gather clears them.
        v = v_buffer.hold(values.gather(piece, stored, padded))
        _add_product(acc_p, p_buffer.hold(p).mT, v, pv_buffer, first=piece.first)
        if mass is not None:
            mass.add(piece, p, piece.rows(softmax.peak).unsqueeze(1))

    total = softmax.total
    lse2 = total.log2().add_(softmax.peak)
    if lists.sizes is not None:
        total.masked_fill_(total == 0, 1)
    exact = acc.div_(total.unsqueeze(-1))
    if padding is not None:
        exact.masked_fill_(padding.unsqueeze(-1), 0)
        lse2.masked_fill_(padding, float("-inf"))
    block_mass = acc.new_zeros((B, H, Nq, 0)) if mass is None else mass.finish(lse2).view(B, H, Nq, M)
    out = exact.view(query.shape).to(query.dtype)
    shape = rest_shape(query, keep_rest)
    rest = exact.sub_(out.flatten(0, 2)).to(query.dtype).view(shape) if math.prod(shape) else query.new_empty(shape)
    return out, lse2.div_(LOG2E).view(query.shape[:-1]), block_mass, rest


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_rest: Tensor,
    scale: float,
    num_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py. Where sums are wider than the gradients, heads go in groups: fresh pages cost more than the GEMMs."""

    def of(group: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
        pools = query[group], key_pool[group], value_pool[group]
        sizes = None if key_sizes is None else key_sizes[group]
        dlse = None if grad_lse is None else grad_lse[group]
        rest = out_rest[group] if out_rest.numel() else None
        rows = _BackwardRows(grad_out[group], dlse, query[group], out[group], rest, lse[group], scale)
        return _backward_heads(rows, *pools, block_index[group], sizes, scale, num_persistent)

    if block_index.numel() and query.dtype == _work_dtype(query):
        return of((slice(None), slice(None)))
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (query, key_pool, value_pool))
    for group in _head_groups(key_pool) if block_index.numel() else ():
        dq[group], dk[group], dv[group] = of(group)
    return dq, dk, dv


def _backward_heads(
    rows: _BackwardRows,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    key_sizes: Tensor | None,
    scale: float,
    num_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the working type: p = exp(s - lse) again, piece by piece; ds = p (dp - delta),
    delta = <dout, out> - dlse."""
    B, H, S, T, D = key_pool.shape
    lists = Lists(block_index, key_sizes, T)
    keys, values = BlockTable(key_pool, lists), BlockTable(value_pool, lists)
    targets = table_rows(lists.slots, (B, H), (H * S, S))
    work, product = _work_dtype(query), _product_dtype(query)
    dq = torch.zeros(rows.q.shape, dtype=work)
    dk, dv = (torch.zeros((B * H * S, T * D), dtype=work) for _ in range(2))
    k_stored, v_stored = (Buffer(purpose, query.dtype) for purpose in ("stored keys", "stored values"))
    k_buffer, v_buffer = (Buffer(purpose, work) for purpose in ("keys", "values"))
    p_buffer, ds_buffer = (Buffer(purpose, work) for purpose in ("scores", "ds"))
    px_buffer, dsx_buffer, dq_buffer = (
        Buffer(purpose, product) for purpose in ("product scores", "product ds", "products")
    )
    # Where the products for dk and dv go: over the gathered blocks, which are no longer needed by then.
    dk_buffer, dv_buffer = (k_stored, v_stored) if product == query.dtype else (k_buffer, v_buffer)

    for piece in _pieces(query, T, block_index.shape[-1], num_persistent, buffers=2):
        padded = lists.padded_keys(piece)
        kx, vx = keys.gather(piece, k_stored, padded), values.gather(piece, v_stored, padded)
        k, v = k_buffer.hold(kx), v_buffer.hold(vx)
        p = _scores(p_buffer, k, piece.rows(rows.work_q).mT, scale, padded)
        p.sub_(piece.rows(rows.lse2).unsqueeze(1)).exp2_()
        dp = ds_buffer.bmm(v, piece.rows(rows.work_do).mT, factor=scale)
        ds = dp.sub_(piece.rows(rows.delta).unsqueeze(1)).mul_(p)
        ds = dsx_buffer.hold(ds)
        _add_product(piece.rows(dq), ds.mT, kx if kx.dtype == product else k, dq_buffer, first=False)
        targets_p = piece.lists(targets).flatten()
        dk_p = k_buffer.hold(dk_buffer.bmm(ds, piece.rows(rows.q)))
        dk.index_add_(0, targets_p, dk_p.view(-1, T * D))
        dv_p = v_buffer.hold(dv_buffer.bmm(px_buffer.hold(p), piece.rows(rows.do)))
        dv.index_add_(0, targets_p, dv_p.view(-1, T * D))
    return dq.view(query.shape), dk.view(key_pool.shape), dv.view(key_pool.shape)


def _head_groups(pool: Tensor) -> Iterator[tuple[slice, slice]]:
    """(batch, heads) slices whose gradient sums take at most GROUP_BYTES, or one head."""
    B, H = pool.shape[:2]
    blocks = 2 * _work_dtype(pool).itemsize * math.prod(pool.shape[2:])
    heads = min(H, max(1, GROUP_BYTES // blocks))
    batch = max(1, GROUP_BYTES // (H * blocks)) if heads == H else 1
    for b in range(0, B, batch):
        for h in range(0, H, heads):
            yield slice(b, b + batch), slice(h, h + heads)


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
        work, product = _work_dtype(query), _product_dtype(query)
        self.work_q, self.work_do = _rows(query, drop, work, "queries"), _rows(grad_out, drop, work, "output gradients")
        self.q, self.do = self.work_q, self.work_do
        if product != work:
            self.q, self.do = (
                _rows(query, drop, product, "product queries"),
                _rows(grad_out, drop, product, "product dO"),
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


def _pieces(query: Tensor, tokens: int, entries: int, num_persistent: int, buffers: int) -> Iterator[Piece]:
    """Pieces whose `buffers` buffers of blocks and as many of scores fill the budget."""
    B, H, Nq, Tq, D = query.shape
    element_bytes = buffers * _work_dtype(query).itemsize
    budget = PIECE_BYTES * torch.get_num_threads()
    return cut_pieces(
        (B * H, Nq), Tq, (num_persistent, entries), (tokens, D), element_bytes=element_bytes, budget=budget
    )


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _nothing_listed(query: Tensor, mass_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.full(query.shape[:-1], float("-inf"), dtype=_work_dtype(query))
    return torch.zeros(query.shape, dtype=query.dtype), lse, lse.new_zeros((*query.shape[:3], mass_entries))


def _padded_rows(query_sizes: Tensor | None, query: Tensor) -> Tensor | None:
    """[B * H * Nq, Tq] bool, True on padding; None when no query block has any."""
    B, H, _, Tq, _ = query.shape
    if query_sizes is None or int(query_sizes.amin()) == Tq:
        return None
    return (torch.arange(Tq) >= query_sizes.unsqueeze(-1)).repeat(B * H, 1)


def _rows(x: Tensor, drop: Tensor | None, dtype: torch.dtype, purpose: str) -> Tensor:
    """x [B, H, Nq, Tq, D] as [B * H * Nq, Tq, D] of a type, 0 in the rows to drop: x itself, or a copy in scratch."""
    if drop is None and x.dtype == dtype and x.is_contiguous():
        return x.flatten(0, 2)
    rows = Buffer(purpose, dtype).view(*x.shape).copy_(x).flatten(0, 2)
    return rows if drop is None else rows.masked_fill_(drop.unsqueeze(-1), 0)


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without oneDNN torch lacks the question, too."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fused(query: Tensor, lists: Lists) -> bool:
    """Whether torch's fused attention serves these lists, and is faster here."""
    return query.dtype == torch.bfloat16 and lists.sizes is None and has_matrix_units()


def _product_dtype(query: Tensor) -> torch.dtype:
    """Type of the factors of P V, dS K, dS Q and P dO: bfloat16 for bfloat16 input where oneDNN multiplies it fast."""
    return torch.bfloat16 if query.dtype == torch.bfloat16 and multiplies_bfloat16() else _work_dtype(query)


def _add_product(acc: Tensor, a: Tensor, b: Tensor, buffer: Buffer, first: bool) -> None:
    """acc = a @ b at first, acc += a @ b later, batched; by way of `buffer` where acc is wider than the factors."""
    if acc.dtype == a.dtype:
        acc.baddbmm_(a, b, beta=0 if first else 1)
    else:
        product = buffer.bmm(a, b)
        acc.copy_(product) if first else acc.add_(product)


def _scores(buffer: Buffer, k: Tensor, q: Tensor, scale: float, padded: Tensor | None) -> Tensor:
    """Base-2 scores [n, L, R] of k [n, L, D] and q [n, D, R], -inf at padded keys."""
    s = buffer.bmm(k, q, factor=scale * LOG2E)
    return s if padded is None else s.masked_fill_(padded, float("-inf"))


class _Softmax:
    """Softmax of rows whose scores come piece by piece: weights exp2(s - peak) and their sum `total`, [B * H * Nq, Tq].

    Any peak near the maximum gives the same digits. It stays 0, which saves two passes over the scores, until the sum
    of a piece leaves [1 / SAFE_SUM, SAFE_SUM]; from then on it is the running maximum.
    """

    def __init__(self, rows: Tensor):
        self.peak, self.total = rows.new_zeros(rows.shape[:-1]), rows.new_empty(rows.shape[:-1])
        self.safe = True

    def weigh(self, piece: Piece, scores: Callable[[], Tensor], padded: bool) -> tuple[Tensor, Tensor | None]:
        """Weights [n, L, R] of a piece, in the place of its scores, and the factor on what was accumulated before."""
        total, decay = piece.rows(self.total).unsqueeze(1), None
        sums = total if piece.first else torch.empty_like(total)
        s = scores()
        if self.safe:
            torch.sum(s.exp2_(), 1, keepdim=True, out=sums)
            least, most = (float(x) for x in sums.aminmax())
            # Sums that vanish matter only at first: later they vanish beside what is there.
            self.safe = most < SAFE_SUM and (least > 1 / SAFE_SUM or not piece.first)
            if not self.safe:
                s = scores()
        if not self.safe:
            peak = piece.rows(self.peak).unsqueeze(1)
            decay = _raise_peak(s, peak, piece.first)
            if padded:
                peak.clamp_(min=LOWEST)
            torch.sum(s.sub_(peak).exp2_(), 1, keepdim=True, out=sums)
        if decay is not None:
            total.mul_(decay)
        if not piece.first:
            total.add_(sums)
        return s, decay


def _raise_peak(s: Tensor, peak: Tensor, first: bool) -> Tensor | None:
    """Raise peak [n, 1, R] to the maximum of s [n, L, R] over keys; factor on what was accumulated, None at first."""
    n, L, R = s.shape
    lanes = math.gcd(L, 32 // math.gcd(R, 32))  # torch reduces whole vectors of columns fast, odd ones one by one
    if lanes > 1:
        s = s.view(n, L // lanes, lanes * R).amax(1).view(n, lanes, R)
    if first:
        torch.amax(s, 1, keepdim=True, out=peak)
        return None
    old = peak.clone()
    torch.maximum(old, s.amax(1, keepdim=True), out=peak)
    return old.sub_(peak).exp2_()


class _Mass:
    """Block mass: per piece the sums of exp2(s - peak) over each block's keys, set right by the final lse."""

    def __init__(self, rows: Tensor, entries: int):
        self.sums = rows.new_zeros((len(rows), entries, rows.shape[1]))
        self.peaks = torch.zeros_like(self.sums)

    def add(self, piece: Piece, weights: Tensor, peak: Tensor) -> None:
        entries = piece.entries.stop - piece.entries.start
        sums = weights.unflatten(1, (entries, -1)).sum(2)
        piece.put_lists(self.sums, sums)
        piece.put_lists(self.peaks, peak.expand_as(sums))

    def finish(self, lse2: Tensor) -> Tensor:
        """[B * H * Nq, M]; rows with lse -inf (padded or empty) count nothing."""
        lse2 = lse2.masked_fill(lse2 == float("-inf"), float("inf"))
        return self.peaks.sub_(lse2.unsqueeze(1)).exp2_().mul_(self.sums).sum(-1)
