"""What others see of the sparse memory: a rule of retention its blocks, a viewer where the persistent ones are from."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_selection.interface import block_importance, block_scores, pool_blocks
from sparse_forcing.memory.retention.base import BlockView
from sparse_forcing.memory.slots import gather_slots
from sparse_forcing.memory.sparse_pool import SlotPlan, SparseLayer
from sparse_forcing.memory.sparse_selection import map_heads
from sparse_forcing.model.geometry import TileLayout


def view_blocks(plan: SlotPlan, layer: int, state: SparseLayer, slots: Tensor, chunk: int) -> BlockView:
    """What a rule of retention sees of the blocks in `slots` [B, H, N], after the clean pass of `chunk`."""
    sizes = None if state.sizes is None else gather_slots(state.sizes, slots)

    def attention() -> Tensor:
        assert state.queries is not None, "blocks are ranked after a clean pass"
        keys = gather_slots(state.representatives, slots)
        projection = state.key_projection
        if projection is not None and projection.dim() == 4:  # of all layers
            keys = map_heads(keys.unflatten(0, (len(projection), -1)), projection[:, None]).flatten(0, 1)
        elif projection is not None:
            keys = map_heads(keys, projection)
        return block_importance(block_scores(state.queries, keys))

    def mass() -> Tensor:
        assert state.mass is not None, "blocks are ranked after a clean pass"
        return gather_slots(state.mass, slots)

    def head() -> Tensor:
        assert state.retention_head is not None, "blocks are ranked after a clean pass"
        return state.retention_head

    return BlockView(
        layer=layer,
        chunk=chunk,
        frame_blocks=plan.frame_blocks,
        num_persistent=state.persistent.shape[2],
        origin=gather_slots(state.origin, slots),
        first_frame=gather_slots(state.position, slots),
        state=gather_slots(state.retained, slots),
        sizes=sizes,
        suppliers={
            "attention": attention,
            "mass": mass,
            "head": head,
            "pooled_keys": lambda: gather_slots(state.representatives, slots),
            "pooled_values": lambda: pool_blocks(state.read("values", slots), sizes),
            "keys": lambda: state.read("keys", slots),
            "values": lambda: state.read("values", slots),
        },
    )


def map_origins(states: list[SparseLayer], layout: TileLayout, chunk: int | None) -> Tensor:
    """[f, rows, cols] in [0, 1]: share of layers and heads whose persistent set holds something of this place, of one
    chunk or (None) of any, for the first sample."""
    n = layout.num_blocks
    kept = torch.zeros(n, device=states[0].window.device)
    for state in states:
        origin = gather_slots(state.origin, state.persistent)[0]
        counts = torch.ones_like(origin) if chunk is None else origin // n == chunk
        found = torch.zeros(len(origin), n, device=kept.device)
        kept += found.scatter_reduce_(1, origin % n, counts.to(found), "amax").mean(0) / len(states)
    layout = layout.on(kept.device)
    tokens = kept.repeat_interleave(layout.sizes)[layout.inverse]
    return tokens.view(layout.frames, layout.rows, layout.cols)
