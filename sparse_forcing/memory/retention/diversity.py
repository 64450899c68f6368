"""The diversity rule: of blocks that say the same, one stays.

Legend: B batch, H heads, N candidates, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.kernels.block_selection.interface import block_scores
from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule


def cosines(vectors: Tensor) -> Tensor:
    """[B, H, N, N] of vectors [B, H, N, D], exactly symmetric, at least in float32."""
    unit = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
    product = block_scores(unit, unit, scale=1.0)
    return (product + product.transpose(-1, -2)) / 2


def eliminate(similarity: Tensor, capacity: int, relevance: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """[B, H, N] 1 for what stays and 0 for what goes, when the least worthy of N is dropped until `capacity` are left.

    At each step a candidate is worth weight * relevance - (1 - weight) * similarity to the one of those left that it
    resembles most; of equals the later goes. So of a pair that is most alike exactly one goes, and the other one is
    judged anew without it.

    Args:
        similarity: [B, H, N, N], symmetric; relevance: [B, H, N]. 0 < capacity < N.
    """
    n = similarity.shape[-1]
    drops = n - capacity
    index = torch.arange(n, device=similarity.device)
    others = similarity.masked_fill(index[:, None] == index, -torch.inf)
    # No more than `drops` others can go, so one of the best drops + 1 is left.
    nearest, who = others.topk(min(drops + 1, n), -1)
    left = torch.ones(similarity.shape[:-1], dtype=torch.bool, device=similarity.device)
    for _ in range(drops):
        worth = (weight - 1) * nearest.amax(-1)
        if relevance is not None:
            worth = worth + weight * relevance
        worth = worth.masked_fill(~left, torch.inf)
        least = worth == worth.amin(-1, keepdim=True)
        loser = torch.where(least, index, -1).amax(-1, keepdim=True)
        left = left & (index != loser)
        nearest = nearest.masked_fill(who == loser[..., None], -torch.inf)
    return left.float()


@rule("diversity")
class DiversityRule(RetentionRule):
    """Drop what is most redundant: the cosine of mean values to the nearest other candidate, one block at a time.

    Values, because keys carry positions. What nobody attends to now may be asked for later; what another block says too
    need not be kept twice.
    """

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return eliminate(cosines(blocks.pooled_values), capacity)
