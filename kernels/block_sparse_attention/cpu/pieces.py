"""How the CPU backend cuts its work into cache-sized pieces and gathers the blocks of a piece."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer

WIDE_ROWS = 256  # query rows that share one gather of the persistent blocks
WIDE_SCORES = 1 << 20  # scores of the persistent part below which wide pieces cost more calls than they save


class Cut(NamedTuple):
    """One part of the lists and how it is cut into pieces: some items and a range of their list entries each.

    Narrow (`heads` is None): an item is one query block.
    Wide: an item is one of the `heads` heads and `blocks` of its query blocks, whose lists agree on these entries.

    The methods return what all pieces see of a tensor, one view per piece in their order: slicing piece by piece takes
    as long as the torch calls of a small piece.
    """

    heads: int | None
    items: int
    blocks: int
    entries: range  # where the ranges of entries start

    def first(self) -> Iterator[bool]:
        """Whether no other piece has touched these rows yet."""
        return itertools.cycle(entry == 0 for entry in self.entries)

    def rows(self, x: Tensor) -> list[Tensor]:
        """Views [n, R, ...] of x [B * H * Nq, Tq, ...]."""
        return [rows if self.heads is None else rows.flatten(1, 2) for rows in self._groups(x) for _ in self.entries]

    def lists(self, x: Tensor) -> list[Tensor]:
        """Views [n, m] of x [B * H * Nq, M]."""
        x = self._take_listed(x)
        groups = (lists if self.heads is None else lists[:, 0] for lists in self._groups(x))
        return [part for lists in groups for part in _split(lists, self.entries.step, 1)]

    def flat_lists(self, x: Tensor) -> Sequence[Tensor]:
        """The same as contiguous [n * m]."""
        if self.heads is None and len(self.entries) == 1 and self._take_listed(x) is x:
            return _split(x.flatten(), self.items * x.shape[1], 0)
        return [part.flatten() for part in self.lists(x)]

    def list_rows(self, x: Tensor) -> list[Tensor]:
        """Views [n, m, blocks of an item, Tq] of x [B * H * Nq, M, Tq]."""
        x = self._take_listed(x)
        groups = (x.unsqueeze(1) if self.heads is None else x for x in self._groups(x))
        return [part.transpose(1, 2) for x in groups for part in _split(x, self.entries.step, 2)]

    def _take_listed(self, x: Tensor) -> Tensor:
        """The entries of x [B * H * Nq, M, ...] that this part of the lists has."""
        whole = (self.entries.start, self.entries.stop) == (0, x.shape[1])
        return x if whole else x[:, self.entries.start : self.entries.stop]

    def _groups(self, x: Tensor) -> Sequence[Tensor]:
        """x [B * H * Nq, ...] by the items of a piece: views [n, ...], of wide pieces [n, blocks of an item, ...]."""
        if self.heads is None:
            return _split(x, self.items, 0)
        heads = _split(x.unflatten(0, (self.heads, -1)), self.items, 0)
        return [part for group in heads for part in _split(group, self.blocks, 1)]


def _split(x: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """Views of `size` along a dimension; Tensor.split takes four times as long, and autograd is not recording here."""
    return (x,) if size >= x.shape[dim] else x.unsafe_split(size, dim)


def cut_lists(
    query_blocks: tuple[int, int],
    rows: int,
    entries: tuple[int, int],
    block: tuple[int, int],
    *,
    element_bytes: int,
    budget: int,
    wide_rows: int | None = None,
    scores: bool = True,
) -> list[Cut]:
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
    cuts = []
    if num_persistent:
        group = -(-Nq // -(-Nq * rows // max(wide_rows or WIDE_ROWS, rows)))
        n, m = fit(BH, num_persistent, group * rows)
        cuts.append(Cut(BH, n, group, range(0, num_persistent, m)))
    if num_persistent < M:
        n, m = fit(BH * Nq, M - num_persistent, rows)
        cuts.append(Cut(None, n, 1, range(num_persistent, M, m)))
    return cuts


class Lists:
    """What the query blocks visit: `slots` [B * H * Nq, M] int32 without -1, and how many tokens there are real."""

    def __init__(self, block_index: Tensor, key_sizes: Tensor | None, tokens: int):
        self.heads = block_index.shape[:2]
        self.tokens = tokens
        self.slots = block_index.flatten(0, 2)
        self.sizes: Tensor | None = None  # None when every listed block is full
        self._table_rows: dict[tuple[int, int], Tensor] = {}
        if key_sizes is None and int(block_index.amin()) >= 0:
            return
        if key_sizes is None:
            sizes = torch.where(block_index < 0, 0, tokens)
        else:
            sizes = key_sizes.unsqueeze(2).expand(*block_index.shape[:3], -1)
            sizes = sizes.gather(-1, block_index.clamp(min=0).long()).masked_fill(block_index < 0, 0)
        self.slots = self.slots.clamp(min=0)
        self.sizes = sizes.flatten(0, 2) if int(sizes.amin()) < tokens else None

    def find_padding(self, cut: Cut) -> Iterator[Tensor | None]:
        """Per piece [n, L, 1] bool, True where a gathered key is padding; None when the piece has none."""
        if self.sizes is None:
            yield from itertools.repeat(None)
            return
        for listed in cut.lists(self.sizes):
            full = int(listed.amin()) == self.tokens
            yield None if full else (torch.arange(self.tokens) >= listed.unsqueeze(-1)).view(len(listed), -1, 1)

    def table_rows(self, steps: tuple[int, int]) -> Tensor:
        """The slots as rows of a table in which the slots of batch b, head h start at row b steps[0] + h steps[1]."""
        if self.heads == (1, 1):
            return self.slots
        if steps not in self._table_rows:
            starts = first_rows(*self.heads, *steps, len(self.slots) // math.prod(self.heads))
            self._table_rows[steps] = self.slots + starts
        return self._table_rows[steps]


@lru_cache(maxsize=64)
def first_rows(batch: int, heads: int, step_b: int, step_h: int, repeats: int) -> Tensor:
    """[B * H * repeats, 1] int32; remembered, because a small call would spend a tenth of its time on it."""
    with torch.inference_mode(False):  # an inference tensor could not be part of a later graph
        rows = torch.arange(batch).view(-1, 1) * step_b + torch.arange(heads) * step_h
        return rows.int().flatten().repeat_interleave(repeats).view(-1, 1)


def as_table(pool: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A pool [B, H, S, T, D] as rows of one block each, and the steps in rows from one batch and one head to the next:
    without a copy wherever its blocks lie in one piece."""
    B, H, S, T, D = pool.shape
    stride_b, stride_h, stride_s, stride_t, stride_d = pool.stride()
    if pool.is_contiguous():
        return pool.view(-1, T * D), (H * S, S)
    if (stride_d, stride_t) == (1, D) and stride_s >= T * D and not (stride_b % stride_s or stride_h % stride_s):
        steps = stride_b // stride_s, stride_h // stride_s  # broadcast heads, a range of a longer pool
        rows = (B - 1) * steps[0] + (H - 1) * steps[1] + S
        return pool.as_strided((rows, T * D), (stride_s, 1)), steps
    return pool.reshape(-1, T * D), (H * S, S)


class BlockTable:
    """A pool [B, H, S, T, D] read as a table of blocks, with the table row of every listed block."""

    def __init__(self, pool: Tensor, lists: Lists):
        self.table, steps = as_table(pool)
        self.rows = lists.table_rows(steps)
        self.head_dim = pool.shape[-1]

    def gather(self, rows: Tensor, items: int, buffer: Buffer, padded: Tensor | None = None) -> Tensor:
        """[n, L, D] blocks of table rows [n * m], in `buffer`; keys in `padded` [n, L, 1] are set to 0."""
        blocks, numbers = rows.shape[0], self.table.shape[1]
        torch.index_select(self.table, 0, rows, out=buffer.view(blocks, numbers))
        gathered = buffer.view(items, blocks * numbers // (items * self.head_dim), self.head_dim)
        return gathered if padded is None else gathered.masked_fill_(padded, 0)
