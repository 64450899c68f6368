"""The learned rule: a small head guesses how much attention a block will get later, taught by a cache that forgets
nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule, rule
from sparse_forcing.memory.retention.oracle import AttentionRecorder
from sparse_forcing.model.rope import shift_time
from sparse_forcing.model.selector import BlockSelector, predict_retention, selection_loss

if TYPE_CHECKING:
    from sparse_forcing.memory.config import MemoryConfig


def count_unused_chunks(blocks: BlockView) -> Tensor:
    """[B, H, N, 1] chunks since one gave a block at least an even share of its attention among all in memory."""
    used = blocks.attention >= blocks.attention.mean(-1, keepdim=True)
    return torch.where(used[..., None], 0.0, blocks.state + 1)


def head_inputs(blocks: BlockView) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, N, D] and chunks unused [B, H, N], as a retention head takes them."""
    return shift_time(blocks.pooled_keys, -blocks.first_frame), blocks.pooled_values, blocks.state[..., 0]


@rule("learned")
class LearnedRule(RetentionRule):
    """Keep what the layer's retention head (`sparse_forcing.model.selector`) expects to be attended to."""

    reads = frozenset({"attention"})
    state_size = 1
    learned = True

    def observe(self, blocks: BlockView) -> Tensor:
        return count_unused_chunks(blocks)

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return predict_retention(blocks.head, *head_inputs(blocks))


class RetentionTeacher(AttentionRecorder):
    """What retention heads learn from: attention that a memory of everything gives later, which inference never sees.

    A rollout through such a memory (density 1, more persistent blocks than there will be), given this as its rule,
    leaves for each chunk what the head would have seen of the blocks that have left the window, and `loss` compares.
    """

    reads = frozenset({"attention", "mass"})

    def __init__(self, config: MemoryConfig, *, denoising: bool = False) -> None:
        super().__init__(config, denoising=denoising)
        self.inputs: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def observe(self, blocks: BlockView) -> Tensor:
        super().observe(blocks)
        old, unused = blocks.num_persistent, count_unused_chunks(blocks)
        if old > 1:  # there is something to choose from
            keys, values, _ = head_inputs(blocks)
            self.inputs[blocks.layer, blocks.chunk] = keys[:, :, :old], values[:, :, :old], unused[:, :, :old, 0]
        return unused

    def loss(self, selectors: list[BlockSelector]) -> Tensor:
        """Mean over layers and chunks of KL(share of later attention || softmax of the head's logits)."""
        last = max(chunk for _, chunk in self.noted)
        losses = []
        for (layer, chunk), inputs in self.inputs.items():
            head = selectors[layer].retention
            assert head is not None, "the model has retention heads"
            if chunk < last:
                logits, later = head(*inputs), self.later(layer, chunk)[..., : inputs[0].shape[2]]
                losses.append(selection_loss(logits.unsqueeze(2), later.unsqueeze(2)))
        return torch.stack(losses).mean()
