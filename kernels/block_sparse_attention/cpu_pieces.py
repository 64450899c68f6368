"""How the CPU backend cuts its work into cache-sized pieces and gathers the blocks of a piece.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries; in a piece: n items, R rows each, m entries each, L = m * T keys. Per-row tensors are stored
[B * H * Nq, Tq, ...], lists [B * H * Nq, M].
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

WIDE_ROWS = 256  # query rows that share one gather of the persistent blocks
WIDE_SCORES = 1 << 20  # scores of the persistent part below which wide pieces cost more calls than they save


class Piece(NamedTuple):
    """Query blocks and list entries that are processed together.

    Narrow (`heads` is None): `items` ranges over all query blocks of all heads, one item each.
    Wide: an item is one of the `heads` heads in `items`, made of the rows of the query blocks `blocks` of that head,
    whose lists agree on `entries`.
    """

    heads: int | None
    items: slice
    blocks: slice
    entries: slice
    first: bool  # no other piece has touched these rows yet

    def rows(self, x: Tensor) -> Tensor:
        """View [n, R, ...] of x [B * H * Nq, Tq, ...]."""
        if self.heads is None:
            return x[self.items] if self.items.stop - self.items.start < x.shape[0] else x
        return x.unflatten(0, (self.heads, -1))[self.items, self.blocks].flatten(1, 2)

    def lists(self, x: Tensor) -> Tensor:
        """[n, m] of x [B * H * Nq, M]."""
        if self.heads is None:
            whole = self.entries.stop - self.entries.start == x.shape[1]
            return self.rows(x) if whole else x[self.items, self.entries]
        return x.unflatten(0, (self.heads, -1))[self.items, self.blocks.start, self.entries]

    def put_lists(self, x: Tensor, values: Tensor) -> None:
        """Write values [n, m, R] into x [B * H * Nq, M, Tq]."""
        if self.heads is None:
            x[self.items, self.entries] = values
        else:
            target = x.unflatten(0, (self.heads, -1))[self.items, self.blocks, self.entries]
            target.copy_(values.unflatten(-1, (target.shape[1], x.shape[-1])).transpose(1, 2))


def cut_pieces(
    query_blocks: tuple[int, int],
    rows: int,
    entries: tuple[int, int],
    block: tuple[int, int],
    *,
    element_bytes: int,
    budget: int,
    wide_rows: int | None = None,
    scores: bool = True,
) -> Iterator[Piece]:
    """Wide pieces over the persistent entries, then narrow pieces over the others, each of at most `budget` bytes.

    query_blocks (B * H, Nq) of `rows` rows; entries (persistent, M) of a list; block (T, D), `element_bytes` a number.
    A listed block needs room for itself and, with `scores`, for its scores with every row of its item. Wide pieces have
    `wide_rows` rows or a few more, WIDE_ROWS where None.
    """
    (BH, Nq), (num_persistent, M), (tokens, head_dim) = query_blocks, entries, block

    def fit(items: int, entries: int, item_rows: int) -> tuple[int, int]:
        """Items of a piece and entries per item, as even as possible."""
        blocks = max(1, budget // (element_bytes * tokens * (head_dim + item_rows * scores)))
        entries = -(-entries // -(-entries // blocks))
        pieces = -(-items // max(1, blocks // entries))
        return -(-items // pieces), entries

    if BH * Nq * rows * num_persistent * tokens < WIDE_SCORES:
        num_persistent = 0
    if num_persistent:
        group = -(-Nq // -(-Nq * rows // max(wide_rows or WIDE_ROWS, rows)))
        n, m = fit(BH, num_persistent, group * rows)
        for h in range(0, BH, n):
            for i in range(0, Nq, group):
                for e in range(0, num_persistent, m):
                    visited = slice(e, min(e + m, num_persistent))
                    yield Piece(BH, slice(h, h + n), slice(i, i + group), visited, first=e == 0)
    if num_persistent < M:
        n, m = fit(BH * Nq, M - num_persistent, rows)
        for i in range(0, BH * Nq, n):
            for e in range(num_persistent, M, m):
                visited = slice(e, min(e + m, M))
                yield Piece(None, slice(i, min(i + n, BH * Nq)), slice(None), visited, first=e == 0)


class Lists:
    """What the query blocks visit: `slots` [B * H * Nq, M] int32 without -1, and how many tokens there are real."""

    def __init__(self, block_index: Tensor, key_sizes: Tensor | None, tokens: int):
        self.tokens = tokens
        self.slots = block_index.flatten(0, 2)
        self.sizes: Tensor | None = None  # None when every listed block is full
        if key_sizes is None and int(block_index.amin()) >= 0:
            return
        if key_sizes is None:
            sizes = torch.where(block_index < 0, 0, tokens)
        else:
            sizes = key_sizes.unsqueeze(2).expand(*block_index.shape[:3], -1)
            sizes = sizes.gather(-1, block_index.clamp(min=0).long()).masked_fill(block_index < 0, 0)
        self.slots = self.slots.clamp(min=0)
        self.sizes = sizes.flatten(0, 2) if int(sizes.amin()) < tokens else None

    def padded_keys(self, piece: Piece) -> Tensor | None:
        """[n, L, 1] bool, True where a gathered key is padding; None when the piece has none."""
        if self.sizes is None:
            return None
        listed = piece.lists(self.sizes)
        if int(listed.amin()) == self.tokens:
            return None
        return (torch.arange(self.tokens) >= listed.unsqueeze(-1)).view(len(listed), -1, 1)


class BlockTable:
    """A pool [B, H, S, T, D] read as a table of blocks, with the table row of every listed block."""

    def __init__(self, pool: Tensor, lists: Lists):
        B, H, S, T, D = pool.shape
        stride_b, stride_h, stride_s, stride_t, stride_d = pool.stride()
        steps = H * S, S
        if pool.is_contiguous():
            self.table = pool.view(-1, T * D)
        elif (stride_d, stride_t) == (1, D) and stride_s >= T * D and not (stride_b % stride_s or stride_h % stride_s):
            steps = stride_b // stride_s, stride_h // stride_s  # broadcast heads, a range of a longer pool: no copy
            rows = (B - 1) * steps[0] + (H - 1) * steps[1] + S
            self.table = pool.as_strided((rows, T * D), (stride_s, 1))
        else:
            self.table = pool.reshape(-1, T * D)
        self.rows = table_rows(lists.slots, (B, H), steps)
        self.head_dim = D

    def gather(self, piece: Piece, buffer: Buffer, padded: Tensor | None = None) -> Tensor:
        """[n, L, D] blocks of a piece, in `buffer`; keys in `padded` [n, L, 1] are set to 0."""
        rows = piece.lists(self.rows)
        blocks = buffer.view(rows.numel(), self.table.shape[1])
        torch.index_select(self.table, 0, rows.flatten(), out=blocks)
        blocks = blocks.view(rows.shape[0], -1, self.head_dim)
        return blocks if padded is None else blocks.masked_fill_(padded, 0)


def table_rows(slots: Tensor, heads: tuple[int, int], steps: tuple[int, int]) -> Tensor:
    """slots [B * H * Nq, M] of each head -> rows of a table in which batch b, head h starts at b step_b + h step_h."""
    if heads == (1, 1):
        return slots
    return slots + _first_rows(*heads, *steps, len(slots) // math.prod(heads))


@lru_cache(maxsize=64)
def _first_rows(batch: int, heads: int, step_b: int, step_h: int, repeats: int) -> Tensor:
    """[B * H * repeats, 1] int32; remembered, because a small call would spend a tenth of its time on it."""
    rows = torch.arange(batch).view(-1, 1) * step_b + torch.arange(heads) * step_h
    return rows.int().flatten().repeat_interleave(repeats).view(-1, 1)


class Buffer:
    """Scratch memory of one type for one purpose, kept between pieces and calls; each thread has its own.

    It stays in the cache and costs no page faults; fresh memory for every call took a quarter of a small call's time.
    At most the budget of a piece, or the rows of the largest call.
    """

    _kept = threading.local()

    def __init__(self, purpose: str, dtype: torch.dtype):
        self.dtype = dtype
        self._key = f"{purpose}, {dtype}"
        self._memory: Tensor | None = vars(self._kept).get(self._key)

    def view(self, *shape: int) -> Tensor:
        """Contiguous tensor of this shape with undefined contents."""
        if self._memory is None or self._memory.numel() < math.prod(shape):
            with torch.inference_mode(False):  # an inference tensor could not be written in a later, normal call
                self._memory = vars(self._kept)[self._key] = torch.empty(shape, dtype=self.dtype)
        if self._memory.shape == shape:
            return self._memory
        return self._memory.view(-1)[: math.prod(shape)].view(shape)

    def hold(self, x: Tensor) -> Tensor:
        """x in this buffer's type: x itself when it has it."""
        return x if x.dtype == self.dtype else self.view(*x.shape).copy_(x)

    def bmm(self, a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
        """factor * a @ b, batched, of factors of this buffer's type."""
        return self.view(len(a), a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=factor)
