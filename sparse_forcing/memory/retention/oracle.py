"""The oracle: keeps what will be attended to, which only a rollout that is over can tell; a ceiling for benches.

It has no name in `memory.retention`: give it to `make_memory(rule=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_forcing.memory.retention.base import BlockView, RetentionRule

if TYPE_CHECKING:
    from sparse_forcing.memory.config import MemoryConfig


class AttentionRecorder(RetentionRule):
    """Notes the exact attention mass of every chunk's clean pass, in a memory that keeps every block at density 1.

    A chunk is noted when the next one begins.

    Args:
        denoising: note the chunk's last denoising pass instead: what is recalled is asked for while there is noise.

    Attributes:
        noted: [B, H, M] of each (layer, chunk), over the M blocks there were then.
    """

    reads = frozenset({"mass"})
    state_size = 1  # so that it is asked after every chunk

    def __init__(self, config: MemoryConfig, *, denoising: bool = False) -> None:
        super().__init__(config)
        self.measures_denoising = denoising
        self.noted: dict[tuple[int, int], Tensor] = {}

    def observe(self, blocks: BlockView) -> Tensor:
        self.noted[blocks.layer, blocks.chunk] = blocks.mass
        return blocks.state

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        raise AssertionError("a recorder's memory drops nothing: give it more persistent blocks")

    def later(self, layer: int, chunk: int) -> Tensor:
        """[B, H, M] mass that each of the M blocks up to `chunk` got from all later chunks."""
        count = self.noted[layer, chunk].shape[-1]
        later = [mass[..., :count] for (at, when), mass in self.noted.items() if at == layer and when > chunk]
        return torch.stack(later).sum(0) if later else torch.zeros_like(self.noted[layer, chunk])


class OracleRule(RetentionRule):
    """Rank blocks by attention they will get.

    Args:
        future: for each (layer, chunk), [B, H, M] worth of every block up to that chunk, by its number (for example
            `AttentionRecorder.later` of the same video).
    """

    def __init__(self, config: MemoryConfig, future: Mapping[tuple[int, int], Tensor]) -> None:
        super().__init__(config)
        self.future = future

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return self.future[blocks.layer, blocks.chunk].gather(2, blocks.origin)
