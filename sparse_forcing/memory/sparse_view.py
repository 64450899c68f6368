"""What a rule of retention sees of the sparse memory: its blocks as a view that computes only what is read."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.kernels.block_selection.interface import block_importance, block_scores, pool_blocks
from sparse_forcing.memory.retention.base import BlockView
from sparse_forcing.memory.slots import gather_slots
from sparse_forcing.memory.sparse_pool import SlotPlan, SparseLayer
from sparse_forcing.memory.sparse_selection import map_heads


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
