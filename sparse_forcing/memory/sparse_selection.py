"""How blocks of the sparse memory are compressed and chosen: pooling, the selector's maps, lists, the coarse branch.

Source: Sparse Forcing, arXiv 2604.21221, sections 3 and 5.

Legend: B batch, L tokens of the chunk, H heads, T tokens per block, D head dim, W window blocks, P persistent blocks,
K chosen blocks, N blocks, n blocks of the current chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_forcing.kernels.block_selection.interface import Pools, choose_lists, pool_blocks, store_blocks
from sparse_forcing.memory.slots import gather_slots, put_slots_
from sparse_forcing.memory.sparse_pool import SparseLayer
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import BlockSelector, coarse_attention, map_heads

EXACT = (torch.float32, torch.float64)  # that sums may be taken in


class QueriesAndKeys(NamedTuple):
    """What blocks of the chunk are compared with in one pass, after the selector's maps.

    queries: [B, H, n, D] of the chunk's blocks; keys: [B, H, P + W, D] of everything in memory, in the order of time.
    """

    queries: Tensor
    keys: Tensor


class BlockSelection:
    """Selection of every layer; it holds no state of a rollout.

    Args:
        selectors: per layer, or None for mean pooling.
        top_k: window blocks that each query block attends to.
        fixed: whether the selectors stay as they are for as long as this lives (inference).
    """

    def __init__(self, selectors: list[BlockSelector] | None, top_k: int, *, fixed: bool = False) -> None:
        self.selectors = selectors
        self.top_k = top_k
        self.fixed = fixed
        self._places: dict[tuple[int, int, torch.device], Tensor] = {}
        self._weights: dict[tuple[int, str], Tensor] = {}

    def project(self, layer: int, pooled: Tensor, side: str) -> Tensor:
        """The selector's linear map on pooled vectors [B, H, N, D]; applied late, so that stored representatives can
        be re-phased in time."""
        if self.selectors is None:
            return pooled
        return map_heads(pooled, getattr(self.selectors[layer], f"{side}_projection"))

    def pool(self, layout: TileLayout, layer: int, blocks: Tensor, side: str) -> Tensor:
        """[B, H, n, D] pooled blocks [B, H, n, T, D]: queries and keys by the selector's weights, values by none."""
        if self.selectors is None:  # without a coarse branch nothing is learned through pooled vectors
            weights, blocks = None, blocks.detach()
        else:
            own = self.selectors[layer]
            weights = {"query": own.query_weights, "key": own.key_weights, "value": None}[side]
        if self._pools_fixed(layout, blocks):
            return self._pool_fixed(layer, blocks, weights, side)
        return pool_blocks(blocks, layout.ragged_sizes(blocks.device), weights)

    def _pool_fixed(self, layer: int, blocks: Tensor, weights: Tensor | None, side: str) -> Tensor:
        """`pool_blocks` of full blocks with weights that are normalised once: a small model on a CPU spends its time
        between calls."""
        if weights is None:
            return blocks.mean(3)
        if (layer, side) not in self._weights:
            total = weights.abs().sum(-1, keepdim=True)
            normal = weights / total.masked_fill(total == 0, 1)
            self._weights[layer, side] = normal.to(blocks.dtype)[:, None, :, None]
        return (blocks * self._weights[layer, side]).sum(3)

    def store(self, layout: TileLayout, layer: int, state: SparseLayer, keys: Tensor, values: Tensor) -> None:
        """Write the chunk's blocks [B, H, n, T, D] and their representatives into its slots, in place; representatives
        that somebody may hold in a copy. No gradient goes through them."""
        assert state.own_rows is not None
        if not state.in_place:
            state.copy_representatives()
        pools = Pools(state.keys, state.values, state.representatives, state.value_representatives)
        weights = None if self.selectors is None else self.selectors[layer].key_weights
        if not self._pools_fixed(layout, keys):
            store_blocks(keys, values, state.own_rows, pools, layout.ragged_sizes(keys.device), weights)
            return
        blocks = [keys, values, self._pool_fixed(layer, keys, weights, "key")]
        if pools.value_representatives is not None:
            blocks.append(self._pool_fixed(layer, values, None, "value"))
        put_slots_([pool for pool in pools if pool is not None], state.own_rows, blocks, state.own_rows)

    def _pools_fixed(self, layout: TileLayout, blocks: Tensor) -> bool:
        return self.fixed and layout.uniform and blocks.device.type == "cpu" and blocks.dtype in EXACT

    def pool_chunk(
        self, layout: TileLayout, layer: int, tokens: Tensor, blocks: Tensor, side: str, *, again: bool
    ) -> Tensor:
        """[B, H, n, D] the chunk's pooled blocks [B, H, n, T, D].

        again: cut and pool its tokens [B, L, H, D], which attention keeps anyway, once more in the backward pass, so
            that nothing keeps the blocks.
        """
        if not again:
            return self.pool(layout, layer, blocks, side)

        def pool(tokens: Tensor) -> Tensor:
            return self.pool(layout, layer, layout.to_blocks(tokens), side)

        return checkpoint(pool, tokens, use_reentrant=False, preserve_rng_state=False)

    def compare(
        self, layer: int, state: SparseLayer, pooled_queries: Tensor, *, again: bool
    ) -> tuple[Tensor | None, QueriesAndKeys]:
        """(coarse branch, queries and keys of one pass, mapped once for all that asks and without a gradient).

        The branch is [B, H, n, 1, D], gated attention of the query blocks over the representatives of everything in
        memory; None without a learned selector.

        again: compute it once more in the backward pass instead of keeping what it computes with.
        """
        if self.selectors is None:
            return None, QueriesAndKeys(pooled_queries.detach(), gather_slots(state.representatives, state.slots))
        values = state.value_representatives
        assert values is not None
        inputs = layer, pooled_queries, state.representatives, values, state.slots
        if again:
            coarse, *compared = checkpoint(self._coarse, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            coarse, *compared = self._coarse(*inputs)
        return coarse, QueriesAndKeys(*compared)

    def _coarse(
        self, layer: int, pooled_queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self.selectors is not None
        queries = self.project(layer, pooled_queries, "query")
        keys = self.project(layer, gather_slots(keys, slots), "key")
        found = coarse_attention(queries, keys, gather_slots(values, slots))
        gated = self.selectors[layer].gate.to(found.dtype)[:, None, None] * found
        return gated.unsqueeze(3), queries.detach(), keys.detach()

    @torch.no_grad()
    def lists(self, state: SparseLayer, compared: QueriesAndKeys) -> Tensor:
        """[B, H, n, P + K] int32: every query block sees all of P and its best window blocks, itself included."""
        num_window, n = state.num_window, compared.queries.shape[2]
        if self.top_k >= num_window:
            return state.slots.int().unsqueeze(2).expand(-1, -1, n, -1)
        window = compared.keys[:, :, state.num_persistent :]
        own = self._own_places(num_window, n, window.device)
        return choose_lists(compared.queries, window, state.persistent, state.window, top_k=self.top_k, own=own)

    def _own_places(self, num_window: int, n: int, device: torch.device) -> Tensor:
        """[n] where the window holds the chunk's blocks; kept, because every layer and pass asks."""
        key = num_window, n, device
        if key not in self._places:
            self._places[key] = torch.arange(num_window - n, num_window, device=device)
        return self._places[key]

    def copy_weights(self, layer: int, state: SparseLayer, *, retention: bool) -> None:
        """Put the weights that blocks are ranked by into the state: outside a layer's pass they may be sharded away."""
        if self.selectors is None:
            return
        selector = self.selectors[layer]
        state.store("key_projection", selector.key_projection.detach().clone())
        if retention:
            assert selector.retention is not None
            state.store("retention_head", selector.retention.pack())
