"""CPU backend: gather the listed blocks in cache-sized pieces, batched GEMMs, online softmax, flash-style backward.

Three decisions carry the speed (figures in README.md):

* Scores are computed key-major, s[n] = K[n] q[n]^T with shape [L, R]: every GEMM of the forward and of the backward
  then has the layout that MKL runs fastest with only R = 64 query rows, and reductions over keys run along vectors.
* A piece (some query blocks x some list entries) is a few MiB: small enough for the cache, large beside the cost of
  the torch calls that process it. Pieces of one query block are joined by an online softmax in (acc, peak, total).
* The persistent entries are the same for all query blocks of a head. They are visited by wide pieces, whose rows are
  many query blocks at once, so a gathered block serves hundreds of rows. Nothing else differs between the two kinds.

Softmax works in base 2: exp2 costs a third of exp here. bfloat16 and float16 are computed in float32; only the factors
of P V, P dO, dS K and dS Q are rounded to bfloat16, for bfloat16 input, where oneDNN multiplies it fast.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries; in a piece: n items, R rows each, m entries each, L = m * T keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu_pieces import (
    BlockTable,
    Buffer,
    Lists,
    Piece,
    cut_pieces,
    table_rows,
)
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape

PIECE_BYTES = 2 << 20  # blocks and scores of a piece, per thread: small in a last-level cache, large beside an op call
GROUP_BYTES = 4 << 20  # float32 sums of the gradients of a group of heads, for types narrower than that
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
    """See ops.py. Online softmax over pieces; `acc` holds sum exp2(s - peak) v, `total` sum exp2(s - peak)."""
    B, H, Nq, _, _ = query.shape
    T, M = key_pool.shape[3], block_index.shape[-1]
    if not block_index.numel():
        return *_nothing_listed(query, M if return_mass else 0), query.new_zeros(rest_shape(query, keep_rest))
    padding = _padded_rows(query_sizes, query)
    q = _rows(query, padding, scale * LOG2E)
    lists = Lists(block_index, key_sizes, T)
    keys, values = BlockTable(key_pool, lists), BlockTable(value_pool, lists)
    acc, peak, total = torch.empty_like(q), q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])
    mass = _Mass(q, M) if return_mass else None
    stored = Buffer("stored keys", query.dtype)  # values overwrite keys: half the cache
    k_buffer, s_buffer = (Buffer(purpose, q.dtype) for purpose in ("keys", "scores"))
    v_buffer, p_buffer = (Buffer(purpose, _product_dtype(query)) for purpose in ("product values", "product scores"))

    for piece in _pieces(query, T, M, num_persistent, buffers=1):
        acc_p, peak_p, total_p = piece.rows(acc), piece.rows(peak).unsqueeze(1), piece.rows(total).unsqueeze(1)
        padded = lists.padded_keys(piece)
        s = s_buffer.bmm(k_buffer.hold(keys.gather(piece, stored)), piece.rows(q).mT)
        if padded is not None:
            s.masked_fill_(padded, float("-inf"))
        decay = _raise_peak(s, peak_p, piece.first)
        if padded is not None:
            peak_p.clamp_(min=LOWEST)
        s.sub_(peak_p).exp2_()
        if decay is None:
            torch.sum(s, 1, keepdim=True, out=total_p)
        else:
            acc_p.mul_(decay.mT)
            total_p.mul_(decay).add_(s.sum(1, keepdim=True))
        # Padded values have weight 0, but 0 * NaN is NaN: gather clears them.
        v = v_buffer.hold(values.gather(piece, stored, padded))
        _add_product(acc_p, p_buffer.hold(s).mT, v, first=piece.first)
        if mass is not None:
            mass.add(piece, s, peak_p)

    lse2 = total.log2().add_(peak)
    if lists.sizes is not None:
        total.masked_fill_(total == 0, 1)
    exact = acc.div_(total.unsqueeze(-1))
    if padding is not None:
        exact.masked_fill_(padding.unsqueeze(-1), 0)
        lse2.masked_fill_(padding, float("-inf"))
    block_mass = q.new_zeros((B, H, Nq, 0)) if mass is None else mass.finish(lse2).view(B, H, Nq, M)
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
        return _backward_heads(rows, *pools, block_index[group], sizes, num_persistent)

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
    px_buffer, dsx_buffer = (Buffer(purpose, product) for purpose in ("product scores", "product ds"))
    # Where the products for dk and dv go: over the gathered blocks, which are no longer needed by then.
    dk_buffer, dv_buffer = (k_stored, v_stored) if product == query.dtype else (k_buffer, v_buffer)

    for piece in _pieces(query, T, block_index.shape[-1], num_persistent, buffers=2):
        padded = lists.padded_keys(piece)
        kx, vx = keys.gather(piece, k_stored, padded), values.gather(piece, v_stored, padded)
        k, v = k_buffer.hold(kx), v_buffer.hold(vx)
        p = p_buffer.bmm(k, piece.rows(rows.scaled_q).mT)
        if padded is not None:
            p.masked_fill_(padded, float("-inf"))
        p.sub_(piece.rows(rows.lse2).unsqueeze(1)).exp2_()
        ds = ds_buffer.bmm(v, piece.rows(rows.scaled_do).mT).sub_(piece.rows(rows.delta).unsqueeze(1)).mul_(p)
        ds = dsx_buffer.hold(ds)
        _add_product(piece.rows(dq), ds.mT, kx if kx.dtype == product else k, first=False)
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
    """What the backward needs of every row, [B * H * Nq, Tq, ...]. The scale goes with dout, so that ds carries it.

    q, do: factors of the products for dk and dv. scaled_q, scaled_do: factors of the scores and of dp, in the working
    type, times scale * log2(e) and scale. lse2, delta: base-2 log-sum-exp; scale (<dout, out> - dlse).
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
        product = _product_dtype(query)
        self.scaled_q, self.scaled_do = _rows(query, drop, scale * LOG2E), _rows(grad_out, drop, scale)
        self.q, self.do = (_cleared(x.to(product), drop) for x in (query, grad_out))
        self.lse2 = lse.flatten(0, 2) * LOG2E
        exact = out.flatten(0, 2)
        if out_rest is not None:
            exact = exact.to(self.scaled_do.dtype).add_(out_rest.flatten(0, 2))
        self.delta = (self.scaled_do * exact).sum(-1)
        if grad_lse is not None:
            self.delta.sub_(grad_lse.flatten(0, 2), alpha=scale)
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


def _rows(x: Tensor, drop: Tensor | None, factor: float) -> Tensor:
    """x [B, H, Nq, Tq, D] times factor as a new [B * H * Nq, Tq, D] in the working type, 0 in the rows to drop."""
    rows = torch.empty(x.shape, dtype=_work_dtype(x))
    torch.mul(x, factor, out=rows) if x.dtype == rows.dtype else rows.copy_(x).mul_(factor)
    rows = rows.flatten(0, 2)
    return rows if drop is None else rows.masked_fill_(drop.unsqueeze(-1), 0)


def _cleared(x: Tensor, drop: Tensor | None) -> Tensor:
    """x [B, H, Nq, Tq, D] as [B * H * Nq, Tq, D], 0 in the rows to drop."""
    rows = x.contiguous().flatten(0, 2)
    return rows if drop is None else rows.masked_fill(drop.unsqueeze(-1), 0)


def _product_dtype(query: Tensor) -> torch.dtype:
    """Type of the factors of P V, dS K, dS Q and P dO: bfloat16 for bfloat16 input where oneDNN multiplies it fast."""
    if query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return _work_dtype(query)


def _add_product(acc: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """acc = a @ b at first, acc += a @ b later, batched; acc may be of a wider type than the factors."""
    if acc.dtype == a.dtype:
        acc.baddbmm_(a, b, beta=0 if first else 1)
    else:
        acc.copy_(torch.bmm(a, b)) if first else acc.add_(torch.bmm(a, b))


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

    def __init__(self, q: Tensor, entries: int):
        self.sums = q.new_zeros((len(q), entries, q.shape[1]))
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
