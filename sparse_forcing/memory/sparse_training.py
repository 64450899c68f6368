"""Sparse attention for training: what autograd keeps of a layer's pool, and the loss that teaches its selector.

A pool of blocks is written in place, so autograd cannot hold it, and copies of it would keep the window and the
persistent set once per chunk. The chunks themselves never change: each is kept once, and a pass remembers only which
block of the history lies in which slot (Sparse Forcing, arXiv 2604.21221, section 6: "eviction as index tensors").

Legend: B batch, H heads, S slots, N blocks of the history, n blocks of the current chunk, T tokens per block, D head
dim, L tokens of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.kernels.block_selection.interface import block_scores, pool_blocks
from sparse_forcing.kernels.block_sparse_attention.interface import (
    block_sparse_attention,
    block_sparse_attention_backward,
)
from sparse_forcing.memory.slots import gather_slots
from sparse_forcing.model.eager_gradient import with_gradient
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.rope import shift_time
from sparse_forcing.model.selector import BlockSelector, map_heads, selection_loss

HISTORY_POOLS = 4
"""A history longer than this many pools is replaced by the pool itself, so that long rollouts stay bounded."""


@dataclass(frozen=True, kw_only=True)
class BlockHistory:
    """Finished chunks of one layer as constants, and where their blocks lie in its pool.

    keys, values: [B, H, n, T, D] of each chunk, in the order of time; place: [B, H, S], which block of the
    history is in a slot (the current chunk's come after the last finished one), -1 in an unused one;
    kept_at: [B, H, S] position in time that the block's keys have here.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    place: Tensor
    kept_at: Tensor

    @property
    def blocks(self) -> int:
        """Blocks of the finished chunks."""
        return sum(x.shape[2] for x in self.keys)

    def blocks_in(self, name: str, slots: Tensor, position: Tensor) -> Tensor:
        """[B, H, N, T, D] "keys" (moved to `position` [B, H, S]) or "values" of the finished blocks in `slots`."""
        chunks = getattr(self, name)
        moved = gather_slots(self.count_moved_frames(position), slots) if name == "keys" else None
        return rebuild(chunks, gather_slots(self.place, slots), moved)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values, self.place, self.kept_at))

    def with_current(self, slots: Tensor, position: Tensor) -> BlockHistory:
        """The current chunk lies in `slots` [B, H, n], its blocks at `position` [B, H, n]."""
        number = torch.arange(self.blocks, self.blocks + slots.shape[2], device=slots.device)
        place = self.place.scatter(2, slots, number.expand(slots.shape))
        return replace(self, place=place, kept_at=self.kept_at.scatter(2, slots, position))

    def with_chunk(self, keys: Tensor, values: Tensor) -> BlockHistory:
        """The current chunk is finished: keep its blocks [B, H, n, T, D]."""
        return replace(self, keys=(*self.keys, keys.detach()), values=(*self.values, values.detach()))

    def bound(self, pool: tuple[Tensor, Tensor], position: Tensor) -> BlockHistory:
        """This history; the pool itself [B, H, S, T, D] as one, its keys at `position`, once it has become long."""
        slots = position.shape[2]
        if self.blocks <= HISTORY_POOLS * slots:
            return self
        place = torch.arange(slots, device=position.device).expand_as(position)
        return BlockHistory(place=place, kept_at=position).with_chunk(*pool)

    def pools(self, keys: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, T, D] as they lie in their slots, but for those of the current chunk, whose blocks
        look like `keys` [B, H, n, T, D]. position: [B, H, S] of all keys now, None while none has moved."""
        if not self.blocks:
            b, h, _, t, d = keys.shape
            shape = b, h, self.place.shape[2], t, d
            return keys.new_zeros(shape), keys.new_zeros(shape)
        place = self.place.clamp(0, self.blocks - 1)
        moved = None if position is None else self.count_moved_frames(position)
        return rebuild(self.keys, place, moved), rebuild(self.values, place)

    def count_moved_frames(self, position: Tensor) -> Tensor:
        """[B, H, S] frames that keys now at `position` have moved since they were kept."""
        return (position - self.kept_at).int()


def rebuild(chunks: tuple[Tensor, ...], place: Tensor, moved: Tensor | None = None) -> Tensor:
    """The pool [B, H, S, T, D] whose slots hold the blocks `place` [B, H, S], from 0 on, of the chunks.

    Args:
        moved: [B, H, S] frames that each key block has moved in time since its chunk was kept.
    """
    pool = gather_slots(chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2), place)
    return pool if moved is None else shift_time(pool, moved[..., None])


@dataclass(frozen=True, kw_only=True)
class PassTables:
    """What a pass with gradients reads apart from keys and values.

    index: [B, H, n, M] int32 slots each query block attends to, the first `num_persistent` the same for all;
    key_sizes: [B, H, S] int32 or None; place, moved: see `rebuild`, with the chunk's own blocks after the history's.
    """

    index: Tensor
    key_sizes: Tensor | None
    place: Tensor
    moved: Tensor | None
    num_persistent: int
    backend: str


class RebuiltAttention(torch.autograd.Function):
    """Attention [B, L, H, D] of a chunk over its pool, differentiable in the chunk's own queries, keys and values.

    The result is kept in the order of tokens, in which the projection after it keeps it too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pool: tuple[Tensor, Tensor],
        history: BlockHistory,
        tables: PassTables,
        layout: TileLayout,
    ) -> Tensor:
        """query, key, value: [B, L, H, D] of the chunk; pool: all keys and values as they lie now, not kept."""
        found = block_sparse_attention(
            layout.to_blocks(query),
            *pool,
            tables.index,
            query_sizes=layout.ragged_sizes(query.device),
            key_sizes=tables.key_sizes,
            num_persistent=tables.num_persistent,
            backend=tables.backend,
        )
        out = layout.from_blocks(found.out).contiguous()
        ctx.save_for_backward(
            query,
            key,
            value,
            out,
            found.lse,
            tables.index,
            tables.key_sizes,
            tables.place,
            tables.moved,
            *history.keys,
            *history.values,
        )
        ctx.layout, ctx.num_persistent, ctx.backend = layout, tables.num_persistent, tables.backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, layout = ctx.saved_tensors, ctx.layout  # read once: checkpointing computes them again each time
        (*own, out, lse, index, key_sizes, place, moved), chunks = saved[:9], saved[9:]
        query, key, value, out, grad = (layout.to_blocks(x) for x in (*own, out, grads[0]))
        used = place.clamp(min=0)
        keys = rebuild((*chunks[: len(chunks) // 2], key), used, moved)
        values = rebuild((*chunks[len(chunks) // 2 :], value), used)
        found = block_sparse_attention_backward(
            grad,
            query,
            keys,
            values,
            index,
            out=out,
            lse=lse,
            query_sizes=layout.ragged_sizes(query.device),
            key_sizes=key_sizes,
            num_persistent=ctx.num_persistent,
            backend=ctx.backend,
        )
        slots = place.argsort(-1)[..., -layout.num_blocks :]  # of the current chunk, which is the end of the history
        grad_key, grad_value = (gather_slots(x, slots) for x in found[1:])
        return *(layout.from_blocks(x) for x in (found[0], grad_key, grad_value)), None, None, None, None


@torch.no_grad()
def window_mass(
    queries: Tensor, keys: Tensor, values: Tensor, query_sizes: Tensor | None, key_sizes: Tensor | None, backend: str
) -> Tensor:
    """[B, H, n, W] mass that dense attention of queries [B, H, n, T, D] gives each block of the window, whose keys and
    values [B, H, W, T, D] are all it sees."""
    everything = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
    mass = block_sparse_attention(
        queries,
        keys,
        values,
        everything.expand(*queries.shape[:3], -1),
        key_sizes=key_sizes,
        return_mass=True,
        query_sizes=query_sizes,
        backend=backend,
    ).mass
    assert mass is not None
    return mass


def selector_loss(
    selector: BlockSelector,
    queries: Tensor,
    keys: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    mass: Tensor,
) -> Tensor:
    """KL between the attention mass [B, H, n, W] of the window's blocks and the softmax of the selector's scores for
    queries [B, H, n, T, D] and keys [B, H, W, T, D], which get no gradient."""

    def loss(query_weights: Tensor, query_map: Tensor, key_weights: Tensor, key_map: Tensor) -> Tensor:
        pooled_queries = map_heads(pool_blocks(queries, query_sizes, query_weights), query_map)
        pooled_keys = map_heads(pool_blocks(keys, key_sizes, key_weights), key_map)
        return selection_loss(block_scores(pooled_queries, pooled_keys), mass)

    own = selector
    return with_gradient(loss, own.query_weights, own.query_projection, own.key_weights, own.key_projection)
