"""The sparse memory with its blocks in 8 bits: about half the bytes of bfloat16, or twice the blocks for the same.

A block is rounded once, when its chunk is finished, and its keys are turned to their place in time whenever they are
read. A pass over a layer reads from a pool in full precision that all layers share; the chunk's own blocks are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.base import Choices, MemoryGeometry
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.slots import gather_slots, put_slots_, round_blocks, widen_blocks
from sparse_forcing.memory.sparse import SparseMemory
from sparse_forcing.memory.sparse_pool import SparseLayer
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.rope import shift_time_


class EightBitMemory(SparseMemory):
    """A SparseMemory of `cache_dtype` int8, for inference. Raises ConfigError where gradients are asked for."""

    def __init__(
        self, config: MemoryConfig, geometry: MemoryGeometry, cache_gradient: str = "none", **options: Any
    ) -> None:
        if cache_gradient != "none":
            raise ConfigError(f"memory.cache_dtype: {config.cache_dtype} is for inference; leave it out in training")
        super().__init__(config, geometry, cache_gradient, **options)

    @property
    def cache_bytes(self) -> int:
        shared = 0 if self._all is None else self._all.keys.nbytes + self._all.values.nbytes
        return super().cache_bytes + shared

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, clean: bool, choices: Choices | None, ends: bool
    ) -> Tensor | None:
        if (state := self.layers[layer]) is not None:
            unpack(state, moves=self.config.positions == "relative")
        out = super()._attend(layer, query, key, value, clean, choices, ends)
        state = self.layers[layer]
        assert state is not None
        if clean:
            pack(state, self.layout)
        return out


@torch.no_grad()
def unpack(state: SparseLayer, *, moves: bool) -> None:
    """Make the pool that all layers share this one's. moves: whether keys move in time at all."""
    keys, values, scales, at = state.packed
    widen_blocks(keys, scales[:, :, :, 0], state.keys.dtype, out=state.keys)
    widen_blocks(values, scales[:, :, :, 1], state.values.dtype, out=state.values)
    if moves:
        shift_time_(state.keys, (state.position - at)[..., None])


@torch.no_grad()
def pack(state: SparseLayer, layout: TileLayout) -> None:
    """Round the chunk's blocks, which lie in the shared pool."""
    slots = state.own_slots(layout)
    (keys, key_scales), (values, value_scales) = (
        round_blocks(gather_slots(x, slots)) for x in (state.keys, state.values)
    )
    blocks = [keys, values, torch.stack([key_scales, value_scales], 3)]
    put_slots_(state.packed[:3], slots, blocks, state.own_rows)
    state.scatter("packed_at", slots, gather_slots(state.position, slots))
