"""The rule of change: what was different before or after at the same place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule


@rule("change")
class ChangeRule(RetentionRule):
    """Temporal change: a block is worth 1 minus the cosine of its mean value to that of the block just before it or
    just after it at its place, whichever differs more, while both were in the window.

    The clean pass is the only one whose keys and values stay, so change is taken between neighbours in time and not
    between the denoising steps of a chunk.
    """

    state_size = 1

    def observe(self, blocks: BlockView) -> Tensor:
        window = slice(blocks.num_persistent, None)
        state, step = blocks.state.clone(), blocks.frame_blocks
        values = blocks.pooled_values[:, :, window]
        if values.shape[2] > step:
            similar = F.cosine_similarity(values[:, :, step:].float(), values[:, :, :-step].float(), dim=-1)
            after, before = F.pad(1 - similar, (0, step)), F.pad(1 - similar, (step, 0))
            state[:, :, window, 0] = torch.maximum(state[:, :, window, 0], torch.maximum(after, before))
        return state

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return blocks.state[..., 0]
