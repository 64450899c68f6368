"""The combined rule: what was attended to, as far as no other block says it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.memory.retention.accumulated import AccumulatedRule
from sparse_forcing.memory.retention.base import BlockView, rule
from sparse_forcing.memory.retention.diversity import cosines, eliminate


@rule("combined")
class CombinedRule(AccumulatedRule):
    """Diversity with relevance, as in maximal marginal relevance: the least worthy candidate is dropped, one at a time.

    Worth is `memory.retention_weight` times its accumulated attention, as a share of the highest candidate's, less the
    rest of the weight times the cosine of its mean value to the nearest other. 0 is `diversity`, 1 `accumulated`.
    """

    layers_at_once = False  # it reads all values

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        gathered = super().scores(blocks, capacity)
        highest = gathered.amax(-1, keepdim=True).clamp(min=torch.finfo(gathered.dtype).tiny)
        return eliminate(cosines(blocks.pooled_values), capacity, gathered / highest, self.config.retention_weight)
