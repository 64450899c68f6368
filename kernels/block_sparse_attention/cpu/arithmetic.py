"""What forward and backward of the CPU backend share: types, products, rows in scratch, sizes of pieces."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer
from sparse_forcing.kernels.block_sparse_attention.cpu.pieces import Cut, cut_lists

PIECE_BYTES = 3 << 20  # blocks and scores of a piece, per thread: small in a last-level cache, large beside an op call
LOG2E = math.log2(math.e)
SAFE_SUM = 2.0**60  # float32 and bfloat16 end at 2^127: room for values up to 1e19, and 66 binary digits below the sum


def work_dtype(x: Tensor) -> torch.dtype:
    """Type of scores, probabilities and sums: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without oneDNN torch lacks the question, too."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(query: Tensor) -> torch.dtype:
    """Type of the factors of P V, dS K, dS Q and P dO: bfloat16 for bfloat16 input where oneDNN multiplies it fast."""
    return torch.bfloat16 if query.dtype == torch.bfloat16 and multiplies_bfloat16() else work_dtype(query)


def cut_pieces(query: Tensor, tokens: int, entries: int, num_persistent: int, buffers: int) -> list[Cut]:
    """Pieces whose `buffers` buffers of blocks and as many of scores fill the budget."""
    B, H, Nq, Tq, D = query.shape
    element_bytes = buffers * work_dtype(query).itemsize
    budget = PIECE_BYTES * torch.get_num_threads()
    return cut_lists(
        (B * H, Nq), Tq, (num_persistent, entries), (tokens, D), element_bytes=element_bytes, budget=budget
    )


def flat_rows(x: Tensor, drop: Tensor | None, dtype: torch.dtype, purpose: str) -> Tensor:
    """x [B, H, Nq, Tq, D] as [B * H * Nq, Tq, D] of a type, 0 in the rows to drop: x itself, or a copy in scratch."""
    if drop is None and x.dtype == dtype and x.is_contiguous():
        return x.flatten(0, 2)
    rows = Buffer.of(purpose, dtype).view(*x.shape).copy_(x).flatten(0, 2)
    return rows if drop is None else rows.masked_fill_(drop.unsqueeze(-1), 0)


def base2_scores(buffer: Buffer, k: Tensor, q: Tensor, scale: float, padded: Tensor | None) -> Tensor:
    """Base-2 scores [n, L, R] of k [n, L, D] and q [n, D, R], -inf at padded keys."""
    s = buffer.bmm(k, q, factor=scale * LOG2E)
    return s if padded is None else s.masked_fill_(padded, float("-inf"))


def add_product(acc: Tensor, a: Tensor, b: Tensor, buffer: Buffer, first: bool) -> None:
    """acc = a @ b at first, acc += a @ b later, batched; by way of `buffer` where acc is wider than the factors."""
    if acc.dtype == a.dtype:
        acc.baddbmm_(a, b, beta=0 if first else 1)
    else:
        product = buffer.bmm(a, b)
        acc.copy_(product) if first else acc.add_(product)
