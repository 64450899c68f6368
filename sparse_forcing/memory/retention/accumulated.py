"""The accumulated rule: block attention summed over the chunks, older chunks counting less."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule


@rule("accumulated")
class AccumulatedRule(RetentionRule):
    """Heavy hitters (H2O, arXiv 2306.14048) over blocks: what has been looked at stays, though not for ever.

    After each chunk a block's sum is `memory.retention_decay` times what it was, plus its attention among everything in
    memory; a decay of 1 is H2O's plain sum.
    """

    layers_at_once = True
    reads = frozenset({"attention"})
    state_size = 1

    def observe(self, blocks: BlockView) -> Tensor:
        return self.config.retention_decay * blocks.state + blocks.attention[..., None].to(blocks.state)

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return blocks.state[..., 0]
