"""Attention over full blocks on a CPU by selectors that stay as they are: what `sparse_selection` does, in fewer calls.

A small model spends its time between calls. So a chunk's queries, keys and values are laid out and pooled together, the
two maps of a selector are one, scores are computed once for the choice and the coarse branch, and slots are ranked as
they lie in the pool, which has no unused one by then.

Legend: B batch, L tokens of the chunk, H heads, S slots, T tokens per block, D head dim, n blocks of the current chunk,
P persistent blocks, K chosen blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.interface import full_lists_attention
from sparse_forcing.memory.slots import put_slots_
from sparse_forcing.memory.sparse_pool import SparseLayer
from sparse_forcing.memory.sparse_selection import EXACT
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import BlockSelector


@dataclass(frozen=True, kw_only=True)
class FixedWeights:
    """Of one layer and B samples. pool: [3, 1, H, 1, T, 1] weights of the positions in a block of queries, keys and
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
            pool=pool[:, None, :, None, :, None].contiguous(),
            compare=compare.repeat(samples, 1, 1),
            gate=selector.gate.to(dtype).repeat(samples)[:, None, None],
        )


class FixedSelection:
    """Attention and selection of every layer.

    Args:
        selectors: per layer. top_k: window blocks that each query block attends to.
    """

    def __init__(self, selectors: list[BlockSelector], top_k: int) -> None:
        self.selectors, self.top_k = selectors, top_k
        self._weights: dict[tuple[int, int, torch.dtype], FixedWeights] = {}
        self._blocks = torch.empty(0)

    def serves(self, everything: SparseLayer | None, query: Tensor) -> bool:
        """Whether this pass over queries [B, L, H, D] can be had so, given the state of all layers."""
        if everything is None or everything.favour is None or torch.is_grad_enabled():
            return False
        return query.dtype == everything.keys.dtype and query.dtype in EXACT

    @torch.no_grad()
    def weights(self, layer: int, samples: int, dtype: torch.dtype) -> FixedWeights:
        """Made on first use, and kept."""
        key = layer, samples, dtype
        if key not in self._weights:
            self._weights[key] = FixedWeights.of(self.selectors[layer], samples, dtype)
        return self._weights[key]

    def lay_out(self, layout: TileLayout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[3, B, H, n, T, D] blocks of queries, keys and values [B, L, H, D], until those of the next layer."""
        b, _, h, d = query.shape
        shape = 3, b, h, layout.num_blocks, layout.block_tokens, d
        if self._blocks.shape != shape or self._blocks.dtype != query.dtype:
            with torch.inference_mode(False):
                self._blocks = torch.empty(shape, dtype=query.dtype)
        for place, x in zip(self._blocks.flatten(3, 4).transpose(2, 3).unbind(), (query, key, value)):
            place.copy_(x)
        return self._blocks

    def store(self, layer: int, state: SparseLayer, blocks: Tensor) -> Tensor:
        """Write the chunk's keys and values and what is pooled of them into its slots, in place; returns its pooled
        queries [B, H, n, D]."""
        assert state.value_representatives is not None
        assert state.own_rows is not None
        pooled = (blocks * self.weights(layer, blocks.shape[1], blocks.dtype).pool).sum(4)
        pools = state.keys, state.values, state.representatives, state.value_representatives
        put_slots_(pools, state.own_rows, (*blocks[1:].unbind(), *pooled[1:].unbind()), state.own_rows)
        return pooled[0]

    def scores(self, layer: int, state: SparseLayer, pooled_queries: Tensor) -> Tensor:
        """[B * H, n, S] of every query block with every slot."""
        compare = self.weights(layer, len(pooled_queries), pooled_queries.dtype).compare
        mapped = torch.bmm(pooled_queries.flatten(0, 1), compare)
        return torch.bmm(mapped, state.representatives.flatten(0, 1).mT)

    def lists(self, state: SparseLayer, scores: Tensor) -> Tensor:
        """[B, H, n, P + K]: the persistent slots, a query block's own and its best of the window, in any order."""
        assert state.favour is not None
        kept = state.num_persistent + min(self.top_k, state.num_window)
        return (scores.view(state.favour.shape) + state.favour).topk(kept, sorted=False).indices

    def coarse(self, layer: int, state: SparseLayer, scores: Tensor) -> Tensor:
        """[B, H, n, 1, D] what the coarse branch gives every block."""
        assert state.value_representatives is not None
        values = state.value_representatives
        found = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
        found *= self.weights(layer, len(values), values.dtype).gate
        return found.view(*values.shape[:2], -1, 1, values.shape[-1])

    def attend(self, state: SparseLayer, queries: Tensor, index: Tensor, coarse: Tensor) -> Tensor | None:
        """[B, H, n, T, D] of query blocks, the coarse branch added; None where there is no short way."""
        return full_lists_attention(queries, state.keys, state.values, index, plus=coarse)
