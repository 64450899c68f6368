"""No memory: a video that is generated all at once, by weights that see every frame from every other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.base import Choices, MemoryGeometry, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import dense_attention


class WholeVideo(RolloutMemory):
    """What a rollout of one single chunk needs: its frames attend to each other, and nothing is kept of them."""

    remembers = False

    def __init__(self, geometry: MemoryGeometry) -> None:
        super().__init__(MemoryConfig(kind="full", positions="absolute"), geometry)

    def begin_chunk(self, frames: int) -> None:
        """The video. Raises ConfigError for a second chunk."""
        if self.chunk_frames:
            raise ConfigError("memory: a video that is generated all at once has no second chunk")
        super().begin_chunk(frames)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        clean: bool,
        choices: Choices | None = None,
        ends: bool = False,
    ) -> Tensor:
        return dense_attention(query, key, value)

    def _make_room(self, frames: int) -> None:
        """Nothing to forget."""

    def _move_positions(self, frames: int) -> None:
        """Nothing to move."""

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    @property
    def cache_bytes(self) -> int:
        return 0
