"""The exact-mass rule: what the last chunk's tokens truly attended to."""

from __future__ import annotations

from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule


@rule("mass")
class MassRule(RetentionRule):
    """The paper's rule with the attention mass of the clean pass itself in place of its estimate by representatives.

    Window blocks count only for the query blocks that selected them.
    """

    layers_at_once = True
    reads = frozenset({"mass"})

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return blocks.mass
