"""Selection of full blocks on a CPU by selectors that stay as they are: what `sparse_selection` does, in fewer calls.

A small model spends its time between calls. So the two maps of a selector are one, scores are computed once for the
choice and the coarse branch, and slots are ranked as they lie in the pool, which has no unused one by then.

Legend: B batch, L tokens of the chunk, H heads, S slots, T tokens per block, D head dim, n blocks of the current chunk,
P persistent blocks, K chosen blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.memory.slots import put_slots_
from sparse_forcing.memory.sparse_pool import SparseLayer
from sparse_forcing.memory.sparse_selection import EXACT
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import BlockSelector


@dataclass(frozen=True, kw_only=True)
class FixedWeights:
    """Of one layer. pool_queries, pool_keys: [T, H, 1] weights of the positions in a block; compare: [H, D, D] from
    pooled queries to what pooled keys are multiplied with; gate: [H, 1] of the coarse branch."""

    pool_queries: Tensor
    pool_keys: Tensor
    compare: Tensor
    gate: Tensor

    @classmethod
    def of(cls, selector: BlockSelector, dtype: torch.dtype) -> FixedWeights:
        def pooling(weights: Tensor) -> Tensor:
            total = weights.abs().sum(-1, keepdim=True)
            return (weights / total.masked_fill(total == 0, 1)).to(dtype).t().unsqueeze(-1).contiguous()

        query_map, key_map = selector.query_projection.to(dtype), selector.key_projection.to(dtype)
        return cls(
            pool_queries=pooling(selector.query_weights),
            pool_keys=pooling(selector.key_weights),
            compare=query_map @ key_map.mT * query_map.shape[-1] ** -0.5,
            gate=selector.gate.to(dtype)[:, None],
        )


class FixedSelection:
    """Selection of every layer.

    Args:
        selectors: per layer. top_k: window blocks that each query block attends to.
    """

    def __init__(self, selectors: list[BlockSelector], top_k: int) -> None:
        self.selectors, self.top_k = selectors, top_k
        self._weights: dict[tuple[int, torch.dtype], FixedWeights] = {}

    def serves(self, everything: SparseLayer | None, query: Tensor) -> bool:
        """Whether this pass over queries [B, L, H, D] can be had so, given the state of all layers."""
        if everything is None or everything.favour is None or torch.is_grad_enabled():
            return False
        return query.dtype == everything.keys.dtype and query.dtype in EXACT

    @torch.no_grad()
    def weights(self, layer: int, dtype: torch.dtype) -> FixedWeights:
        """Made on first use, and kept."""
        key = layer, dtype
        if key not in self._weights:
            self._weights[key] = FixedWeights.of(self.selectors[layer], dtype)
        return self._weights[key]

    def store(self, layout: TileLayout, layer: int, state: SparseLayer, key: Tensor, value: Tensor) -> None:
        """Write the chunk's keys and values [B, L, H, D] and what is pooled of them into its slots, in place."""
        assert state.value_representatives is not None
        assert state.own_rows is not None
        pools = state.keys, state.values, state.representatives, state.value_representatives
        pooled_keys = self._pool(layout, key, self.weights(layer, key.dtype).pool_keys)
        pooled_values = value.unflatten(1, (layout.num_blocks, -1)).mean(2).transpose(1, 2)
        blocks = layout.to_blocks(key), layout.to_blocks(value), pooled_keys, pooled_values
        put_slots_(pools, state.own_rows, blocks, state.own_rows)

    def pool_queries(self, layout: TileLayout, layer: int, query: Tensor) -> Tensor:
        """[B, H, n, D] of queries [B, L, H, D]."""
        return self._pool(layout, query, self.weights(layer, query.dtype).pool_queries)

    def _pool(self, layout: TileLayout, tokens: Tensor, weights: Tensor) -> Tensor:
        return (tokens.unflatten(1, (layout.num_blocks, -1)) * weights).sum(2).transpose(1, 2)

    def scores(self, layer: int, state: SparseLayer, pooled_queries: Tensor) -> Tensor:
        """[B, H, n, S] of every query block with every slot."""
        return pooled_queries @ self.weights(layer, pooled_queries.dtype).compare @ state.representatives.mT

    def lists(self, state: SparseLayer, scores: Tensor) -> Tensor:
        """[B, H, n, P + K]: the persistent slots, a query block's own, then its best of the window."""
        assert state.favour is not None
        kept = state.num_persistent + min(self.top_k, state.num_window)
        return torch.sort(scores + state.favour, dim=-1, descending=True, stable=True).indices[..., :kept]

    def add_coarse(self, layout: TileLayout, layer: int, state: SparseLayer, scores: Tensor, out: Tensor) -> Tensor:
        """out [B, L, H, D] with the coarse branch added."""
        assert state.value_representatives is not None
        found = (scores.softmax(-1) @ state.value_representatives).transpose(1, 2).unsqueeze(2)  # [B, n, 1, H, D]
        by_block = out.unflatten(1, (layout.num_blocks, -1))
        return torch.addcmul(by_block, found, self.weights(layer, out.dtype).gate).flatten(1, 2)
