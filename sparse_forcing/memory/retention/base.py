"""The interface of a rule of retention: what it sees of a layer's blocks, and what it says about them.

Between two chunks the blocks that leave the window compete with those kept before them, per layer and head. A rule
gives each a score; the memory keeps the highest, the earlier one among equals, and moves whatever the rule wants to
remember of a block along with it. Rules hold nothing of a rollout themselves and read no tensor on the host.

Legend: B batch, H heads, N blocks in the order of time, T tokens per block, D head dim, R numbers of a rule's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError

if TYPE_CHECKING:
    from sparse_forcing.memory.config import MemoryConfig

RULES: dict[str, type[RetentionRule]] = {}
"""Rules by the name that `memory.retention` gives them."""


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """What a rule sees of N blocks of one layer, in the order of time; nothing in it may be written to.

    Args:
        layer: number of the layer, -1 where the samples are those of all layers (`RetentionRule.layers_at_once`).
        chunk: number of the chunk that was finished last.
        frame_blocks: blocks that lie beside each other in time: block i + frame_blocks follows block i at its place,
            as long as both are in the window.
        num_persistent: how many of the N, the first ones, have left the window before.
        origin: [B, H, N] number of each block since the start of the video.
        first_frame: [B, H, N] position in time that its keys are rotated for.
        state: [B, H, N, R] float32 that the rule remembers of each block, `RetentionRule.fresh` for new ones.
        sizes: [B, H, N] int32 tokens of each block; None while all are full. Padding repeats a block's last token.
        suppliers: what is computed only if the rule reads it.
    """

    layer: int
    chunk: int
    frame_blocks: int
    num_persistent: int
    origin: Tensor
    first_frame: Tensor
    state: Tensor
    sizes: Tensor | None = None
    suppliers: Mapping[str, Callable[[], Tensor]] = field(repr=False)

    @cached_property
    def attention(self) -> Tensor:
        """[B, H, N] attention of the last clean pass between representatives: one softmax over these N blocks for each
        query block, summed over the query blocks. The rule must say in `reads` that it needs it."""
        return self.suppliers["attention"]()

    @cached_property
    def mass(self) -> Tensor:
        """[B, H, N] exact attention mass that the tokens of the last clean pass gave each block, through the blocks
        that were selected for them. The rule must say in `reads` that it needs it."""
        return self.suppliers["mass"]()

    @cached_property
    def pooled_keys(self) -> Tensor:
        """[B, H, N, D] pooled keys as the selector sees them, before its linear map."""
        return self.suppliers["pooled_keys"]()

    @cached_property
    def pooled_values(self) -> Tensor:
        """[B, H, N, D] mean of each block's values."""
        return self.suppliers["pooled_values"]()

    @cached_property
    def keys(self) -> Tensor:
        """[B, H, N, T, D] keys, rotated."""
        return self.suppliers["keys"]()

    @cached_property
    def values(self) -> Tensor:
        """[B, H, N, T, D] values."""
        return self.suppliers["values"]()

    @cached_property
    def head(self) -> Tensor:
        """Weights of the layer's retention head (`RetentionHead.packed`), for a rule that says it is `learned`."""
        return self.suppliers["head"]()


class RetentionRule(ABC):
    """Says which blocks stay when there are more than the persistent set holds.

    Class attributes:
        reads: what the clean pass must leave behind for it: "attention", "mass", both or neither.
        measures_denoising: whether `BlockView.mass` is that of the last denoising pass instead (for recorders).
        learned: whether it needs the retention head of the model's selectors.
        state_size: numbers it remembers of each block (R); 0 for a rule without memory, whose `observe` is not called.
        fresh: their value for a block that has just been written.
        layers_at_once: whether all layers may be given to it at once, as more samples: for rules that treat every
            sample and head alike and do not read `BlockView.layer`.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    measures_denoising: bool = False
    learned: ClassVar[bool] = False
    state_size: ClassVar[int] = 0
    fresh: ClassVar[float] = 0.0
    layers_at_once: ClassVar[bool] = False

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config

    def measures_mass(self, clean: bool) -> bool:
        """Whether a pass leaves its attention mass for this rule."""
        return "mass" in self.reads and clean is not self.measures_denoising

    def observe(self, blocks: BlockView) -> Tensor:
        """[B, H, N, R] new state of every block in the memory, after each chunk's clean pass."""
        return blocks.state

    @abstractmethod
    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        """[B, H, N] of the candidates: the `capacity` highest stay, the earlier of two equals. A rule that chooses sets
        instead of ranking blocks gives 1 to those it keeps and 0 to the rest."""


def age_order(blocks: BlockView) -> Tensor:
    """[B, H, N] float32, rising with time."""
    order = torch.arange(blocks.origin.shape[2], dtype=torch.float32, device=blocks.origin.device)
    return order.expand(blocks.origin.shape)


Rule = TypeVar("Rule", bound=type[RetentionRule])


def find_rule(name: str) -> type[RetentionRule]:
    """The rule of that name. Raises ConfigError, which lists those there are."""
    if name == "coarse":
        raise ConfigError("memory.retention: 'coarse' is called 'paper' now")
    if name not in RULES:
        raise ConfigError(f"memory.retention: expected one of {', '.join(sorted(RULES))}, got {name!r:.40}")
    return RULES[name]


def rule(name: str) -> Callable[[Rule], Rule]:
    """Class decorator: `memory.retention: name` means this rule from now on."""

    def register(cls: Rule) -> Rule:
        RULES[name] = cls
        return cls

    return register
