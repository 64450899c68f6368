"""The random rule: a uniform sample of everything that has left the window, the baseline that others must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule

_WORD = (1 << 32) - 1


def mix(x: Tensor) -> Tensor:
    """Numbers below 2^32 (int64) to others that look independent of them; no product reaches 2^63."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _WORD
    return x ^ (x >> 16)


@rule("random")
class RandomRule(RetentionRule):
    """Reservoir sampling by keys: every block has a random number, and the highest stay.

    A block outside the highest of all that came before it would not be among the highest of more, so at any time the
    set is a uniform sample of every block that has left. The number is a function of `memory.retention_seed`, layer,
    head and block alone: the same in any batch, and for all its videos.
    """

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        heads = torch.arange(blocks.origin.shape[1], device=blocks.origin.device)[:, None]
        number = mix((heads * 0 + self.config.retention_seed) & _WORD)
        for part in (blocks.layer, heads, blocks.origin):
            number = mix((number + part + 1) & _WORD)
        return (number >> 8).float()  # 24 bits: float32 tells them apart
