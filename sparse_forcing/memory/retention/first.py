"""The rule of the first: a sink of the video's first blocks."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, age_order, rule


@rule("first")
class FirstRule(RetentionRule):
    """Keep what left the window first, and never anything else."""

    layers_at_once = True

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return -age_order(blocks)
