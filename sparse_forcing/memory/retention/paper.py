"""The paper's rule: the last chunk's attention between block representatives."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule


@rule("paper")
class PaperRule(RetentionRule):
    """P_t = TopC(P_{t-1} u E_t) by the block attention of chunk t (Sparse Forcing, arXiv 2604.21221, section 4).

    A block that a single chunk does not look at is gone for good.
    """

    layers_at_once = True
    reads = frozenset({"attention"})

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return blocks.attention
