"""Selection of full blocks on a CPU by selectors that stay as they are: what `sparse_selection` does, in fewer calls.

A small model spends its time between calls. So a chunk's queries, keys and values are laid out and pooled together, the
two maps of a selector are one, scores are computed once for the choice and the coarse branch, slots are ranked as they
lie in the pool, which has no unused one by then, blocks are read where they were laid out, and what is a view of a
layer's state is made once.

Legend: B batch, L tokens of the chunk, H heads, S slots, T tokens per block, D head dim, n blocks of the current chunk,
P persistent blocks, K chosen blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.interface import full_lists_attention
from sparse_forcing.memory.sparse_pool import SparseLayer
from sparse_forcing.memory.sparse_selection import EXACT
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import BlockSelector


@dataclass(frozen=True, kw_only=True)
class FixedWeights:
    """Of one layer and B samples. pool: [3 * B * H, 1, T] weights of the positions in a block of queries, keys and
    values; compare: [B * H, D, D] from pooled queries to what pooled keys are multiplied with; gate: [B * H, 1, 1] of
    the coarse branch."""

    pool: Tensor
    compare: Tensor
    gate: Tensor

    @classmethod
    def of(cls, selector: BlockSelector, samples: int, dtype: torch.dtype) -> FixedWeights:
        def pooling(weights: Tensor) -> Tensor:
            total = weights.abs().sum(-1, keepdim=True)
            return (weights / total.masked_fill(total == 0, 1)).to(dtype)

        even = torch.full_like(selector.key_weights, 1 / selector.key_weights.shape[-1])
        pool = torch.stack([pooling(selector.query_weights), pooling(selector.key_weights), even.to(dtype)])
        query_map, key_map = selector.query_projection.to(dtype), selector.key_projection.to(dtype)
        compare = query_map @ key_map.mT * query_map.shape[-1] ** -0.5
        return cls(
            pool=pool.repeat(1, samples, 1).flatten(0, 1).unsqueeze(1),
            compare=compare.repeat(samples, 1, 1),
            gate=selector.gate.to(dtype).repeat(samples)[:, None, None],
        )


class ChunkBlocks:
    """The blocks of the current chunk, of one layer after the other, beside the pools of all layers.

    They are rows of one table of keys and of one of values: the chunk's own, then the pools. A list names the former
    where they have just been laid out, so that only a clean pass writes them into the pools.

    Args:
        everything: state of all layers, whose keys and values are moved here.
    """

    def __init__(self, everything: SparseLayer, layout: TileLayout, layers: int) -> None:
        pool, (all_samples, h, _, t, d) = everything.table.numel(), everything.keys.shape
        b, n = all_samples // layers, layout.num_blocks
        self.shape, self.own = (b, h, n, t, d), b * h * n
        rows = everything.keys.new_empty(3 * self.own + 2 * pool, t * d)
        queries, self.keys, key_pool, self.values, value_pool = rows.split([self.own] * 2 + [pool, self.own, pool])
        self.key_table, self.value_table = rows[self.own :].split(self.own + pool)
        everything.keys = key_pool.view_as(everything.keys).copy_(everything.keys)
        everything.values = value_pool.view_as(everything.values).copy_(everything.values)
        self.queries = queries.view(self.shape)
        parts = queries, self.keys, self.values
        self.by_token = [part.view(b, h, n * t, d).transpose(1, 2) for part in parts]
        self.to_pool = rows[: 2 * self.own].view(-1, t, d), self.values.view(-1, t, d)
        self.pooled = rows.new_empty(3, self.own, d)
        self.pooled_from = self.pooled[:2].view(-1, 1, d), self.pooled[2].unsqueeze(1)

    def serve(self, everything: SparseLayer, layout: TileLayout) -> bool:
        """Whether the pools are here, and the chunk's blocks have room."""
        here = self.key_table[self.own :].data_ptr() == everything.keys.data_ptr()
        return here and layout.num_blocks == self.shape[2]

    def rows(self, own_slots: Tensor) -> Tensor:
        """[B, H, S] rows of what is in every slot of all layers, the chunk's blocks being in `own_slots` [B, H, n]."""
        b, h, n = own_slots.shape
        pool = len(self.key_table) - self.own
        rows = torch.arange(self.own, self.own + pool).view(b, h, -1)
        own = torch.arange(self.own).view(-1, h, n)
        return rows.scatter_(2, own_slots, own.repeat(b // len(own), 1, 1))

    def fill(self, *tokens: Tensor) -> None:
        """With queries, keys and values [B, L, H, D]."""
        for place, x in zip(self.by_token, tokens):
            place.copy_(x)


class FixedLayer:
    """Weights of one layer, and the parts of its state as its passes take them."""

    def __init__(self, selector: BlockSelector, state: SparseLayer, blocks: ChunkBlocks) -> None:
        assert state.value_representatives is not None
        assert state.own_rows is not None
        assert state.favour is not None
        assert state.rows is not None
        self.state, self.favour, self.blocks = state, state.favour, blocks
        b, h, n, _, d = blocks.shape
        slots = state.keys.shape[2]
        weights = FixedWeights.of(selector, b, state.keys.dtype)
        self.pooling = weights.pool.repeat_interleave(n, 0).split([2 * blocks.own, blocks.own])
        self.compare, self.gate = weights.compare, weights.gate
        self.own_rows = state.own_rows.view(-1)
        self.rows = state.rows.unsqueeze(2).expand_as(self.favour)
        self.pools = [pool.view(b * h * slots, -1) for pool in (state.keys, state.values)]
        pooled = state.representatives, state.value_representatives
        self.pooled = [pool.view(b * h * slots, d) for pool in pooled]
        self.pooled_keys, self.pooled_values = (pool.view(b * h, slots, d) for pool in pooled)
        self.shape = b, h, n, d

    def pool(self) -> Tensor:
        """Pool the chunk's blocks, keys and values into their slots, in place; returns the queries [B, H, n, D], until
        those of the next layer."""
        for weights, blocks, found in zip(self.pooling, self.blocks.to_pool, self.blocks.pooled_from):
            torch.bmm(weights, blocks, out=found)
        for pool, new in zip(self.pooled, self.blocks.pooled[1:]):
            pool.index_copy_(0, self.own_rows, new)
        return self.blocks.pooled[0].view(self.shape)

    def keep(self) -> None:
        """Write the chunk's keys and values into their slots, in place."""
        for pool, new in zip(self.pools, (self.blocks.keys, self.blocks.values)):
            pool.index_copy_(0, self.own_rows, new)

    def scores(self, pooled_queries: Tensor) -> Tensor:
        """[B * H, n, S] of every query block with every slot."""
        return torch.bmm(torch.bmm(pooled_queries.flatten(0, 1), self.compare), self.pooled_keys.mT)

    def lists(self, scores: Tensor, top_k: int) -> Tensor:
        """[B, H, n, P + K]: the persistent slots, a query block's own and its best of the window, in any order."""
        kept = self.state.num_persistent + min(top_k, self.state.num_window)
        return (scores.view(self.favour.shape) + self.favour).topk(kept, sorted=False).indices

    def coarse(self, scores: Tensor) -> Tensor:
        """[B, H, n, 1, D] what the coarse branch gives every block."""
        return torch.bmm(scores.softmax(-1), self.pooled_values).mul_(self.gate).view(self.shape).unsqueeze(3)

    def attend(self, index: Tensor, coarse: Tensor) -> Tensor | None:
        """[B, L, H, D] of the chunk's queries, the coarse branch added; None where there is no short way."""
        blocks, rows = self.blocks, self.rows.gather(3, index)
        return full_lists_attention(blocks.queries, blocks.key_table, blocks.value_table, rows, plus=coarse)


class FixedSelection:
    """Attention and selection of every layer.

    Args:
        selectors: per layer. top_k: window blocks that each query block attends to.
    """

    def __init__(self, selectors: list[BlockSelector], top_k: int) -> None:
        self.selectors, self.top_k = selectors, top_k
        self._layers: dict[int, FixedLayer] = {}
        self._blocks: ChunkBlocks | None = None

    def begin(self, everything: SparseLayer, layout: TileLayout) -> None:
        """Prepare the state of all layers for the passes over a chunk, where they can be had so."""
        everything.favour_slots(layout)
        if everything.favour is None:
            return
        if self._blocks is None or not self._blocks.serve(everything, layout):
            self._blocks = ChunkBlocks(everything, layout, len(self.selectors))
        everything.store("rows", self._blocks.rows(everything.own_slots(layout)))

    def serves(self, everything: SparseLayer | None, query: Tensor) -> bool:
        """Whether this pass over queries [B, L, H, D] can be had so, given the state of all layers."""
        if everything is None or everything.favour is None or torch.is_grad_enabled():
            return False
        return query.dtype == everything.keys.dtype and query.dtype in EXACT

    def layer(self, number: int, state: SparseLayer, *tokens: Tensor) -> FixedLayer:
        """What a layer attends with, holding queries, keys and values [B, L, H, D] until the next one does: made on
        first use, and kept for as long as the layer's state is this one."""
        assert self._blocks is not None
        found = self._layers.get(number)
        if found is None or found.state is not state:
            found = self._layers[number] = FixedLayer(self.selectors[number], state, self._blocks)
        self._blocks.fill(*tokens)
        return found
