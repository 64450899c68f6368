"""Selection of full blocks on a CPU by selectors that stay as they are: what `sparse_selection` does, in fewer calls.

A small model spends its time between calls. So a chunk's queries, keys and values are laid out and pooled together, the
two maps of a selector are one, scores are computed once for the choice and the coarse branch, slots are ranked as they
lie in the pool, which has no unused one by then, and what is a view of a layer's state is made once.

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
    """Memory for the blocks of a chunk's queries, keys and values, of one layer after the other."""

    def __init__(self, layout: TileLayout, like: Tensor) -> None:
        self.like = like.shape, like.dtype
        b, _, h, d = like.shape
        n, t = layout.num_blocks, layout.block_tokens
        with torch.inference_mode(False):
            self.all = torch.empty(3, b, h, n, t, d, dtype=like.dtype)
        self.queries = self.all[0]
        self.by_token = self.all.flatten(3, 4).transpose(2, 3).unbind()
        self.keys, self.values = self.all[1:].view(2, b * h * n, t * d).unbind()
        self.to_pool = self.all.view(3 * b * h * n, t, d)

    def fill(self, *tokens: Tensor) -> None:
        """With queries, keys and values [B, L, H, D]."""
        for place, x in zip(self.by_token, tokens):
            place.copy_(x)


class FixedLayer:
    """Weights of one layer, and the parts of its state as its passes take them."""

    def __init__(self, selector: BlockSelector, state: SparseLayer, layout: TileLayout) -> None:
        assert state.value_representatives is not None
        assert state.own_rows is not None
        assert state.favour is not None
        self.state, self.favour = state, state.favour
        b, h, slots, _, d = state.keys.shape
        weights = FixedWeights.of(selector, b, state.keys.dtype)
        self.pooling = weights.pool.repeat_interleave(layout.num_blocks, 0)
        self.compare, self.gate = weights.compare, weights.gate
        self.own_rows = state.own_rows.view(-1)
        pools = state.keys, state.values, state.representatives, state.value_representatives
        self.pools = [pool.view(b * h * slots, -1) for pool in pools]
        self.pooled_keys = state.representatives.view(b * h, slots, d).mT
        self.pooled_values = state.value_representatives.view(b * h, slots, d)
        self.shape = b, h, layout.num_blocks, d

    def write(self, blocks: ChunkBlocks) -> Tensor:
        """The chunk's keys and values, and what is pooled of them, into its slots, in place; returns its pooled queries
        [B, H, n, D]."""
        queries, *pooled = torch.bmm(self.pooling, blocks.to_pool).view(3, -1, self.shape[-1]).unbind()
        for pool, new in zip(self.pools, (blocks.keys, blocks.values, *pooled)):
            pool.index_copy_(0, self.own_rows, new)
        return queries.view(self.shape)

    def scores(self, pooled_queries: Tensor) -> Tensor:
        """[B * H, n, S] of every query block with every slot."""
        return torch.bmm(torch.bmm(pooled_queries.flatten(0, 1), self.compare), self.pooled_keys)

    def lists(self, scores: Tensor, top_k: int) -> Tensor:
        """[B, H, n, P + K]: the persistent slots, a query block's own and its best of the window, in any order."""
        kept = self.state.num_persistent + min(top_k, self.state.num_window)
        return (scores.view(self.favour.shape) + self.favour).topk(kept, sorted=False).indices

    def coarse(self, scores: Tensor) -> Tensor:
        """[B, H, n, 1, D] what the coarse branch gives every block."""
        return torch.bmm(scores.softmax(-1), self.pooled_values).mul_(self.gate).view(self.shape).unsqueeze(3)


class FixedSelection:
    """Attention and selection of every layer.

    Args:
        selectors: per layer. top_k: window blocks that each query block attends to.
    """

    def __init__(self, selectors: list[BlockSelector], top_k: int) -> None:
        self.selectors, self.top_k = selectors, top_k
        self._layers: dict[int, FixedLayer] = {}
        self._blocks: ChunkBlocks | None = None

    def serves(self, everything: SparseLayer | None, query: Tensor) -> bool:
        """Whether this pass over queries [B, L, H, D] can be had so, given the state of all layers."""
        if everything is None or everything.favour is None or torch.is_grad_enabled():
            return False
        return query.dtype == everything.keys.dtype and query.dtype in EXACT

    def layer(self, number: int, state: SparseLayer, layout: TileLayout) -> FixedLayer:
        """Made on first use, and kept for as long as the layer's state is this one."""
        found = self._layers.get(number)
        if found is None or found.state is not state:
            found = self._layers[number] = FixedLayer(self.selectors[number], state, layout)
        return found

    def lay_out(self, layout: TileLayout, query: Tensor, key: Tensor, value: Tensor) -> ChunkBlocks:
        """Blocks of queries, keys and values [B, L, H, D], until those of the next layer."""
        if self._blocks is None or self._blocks.like != (query.shape, query.dtype):
            self._blocks = ChunkBlocks(layout, query)
        self._blocks.fill(query, key, value)
        return self._blocks

    def attend(self, layer: FixedLayer, blocks: ChunkBlocks, index: Tensor, coarse: Tensor) -> Tensor | None:
        """[B, H, n, T, D] of query blocks, the coarse branch added; None where there is no short way."""
        return full_lists_attention(blocks.queries, layer.state.keys, layer.state.values, index, plus=coarse)
