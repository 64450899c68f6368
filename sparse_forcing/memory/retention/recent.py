"""The rule of the most recent: a longer window, of the same bytes."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, age_order, rule


@rule("recent")
class RecentRule(RetentionRule):
    """Keep what left the window last."""

    layers_at_once = True

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return age_order(blocks)
