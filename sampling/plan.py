"""What a video is to be, before its first chunk is made: the arguments of a stream, checked and resolved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_forcing.memory import RolloutMemory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.noise import NoiseSource
from sparse_forcing.sampling.starts import GivenFrames


@dataclass(frozen=True, kw_only=True)
class VideoLayout:
    """The sizes of a video and what it goes on from.

    size: height and width in pixels; latent_size: rows and columns of its latents.
    chunks: latent frames of each chunk to generate; starts: the pixel frame that each begins with.
    """

    size: tuple[int, int]
    latent_size: tuple[int, int]
    chunks: list[int]
    starts: list[int]
    given: GivenFrames | None

    @property
    def latent_frames(self) -> int | None:
        """Latent frames in all, given ones among them; None where it is not known how many are given."""
        before = 0 if self.given is None else self.given.latent_frames
        return None if before is None else before + sum(self.chunks)


@dataclass(frozen=True)
class VideoPlan:
    """Everything that a rollout is started with.

    text: [B, T, text_dim]; unconditional_text, text_at, recache: see `rollout`.
    single: whether one video was asked for by itself, so that its frames have no batch dimension.
    """

    layout: VideoLayout
    sampler: SamplerConfig
    text: Tensor
    unconditional_text: Tensor | None
    text_at: Callable[[int], Tensor | None] | None
    noise: NoiseSource
    memory: RolloutMemory
    recache: bool
    single: bool
