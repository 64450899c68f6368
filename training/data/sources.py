"""Where a stage's clips and prompts come from. A draw is a number; equal draws give equal samples, on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.prompts import read_prompts
from sparse_forcing.training.data.procedural import procedural_batch
from sparse_forcing.training.data.shards import Shards
from sparse_forcing.vae import VideoAutoencoder

KINDS = ("procedural", "prompts", "shards")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Clips and prompts of a stage.

    Args:
        kind: procedural (clips made on the fly), prompts (a text file, one per line), shards (prepared tensors).
        path: file or folder for all but procedural.
        latent_frames: length of a clip; size: pixels of its sides (procedural).
        caption_dropout: share of samples that train without their caption.
    """

    kind: str = "procedural"
    path: Path | None = None
    latent_frames: int = 10
    size: int = 64
    two_object_fraction: float = 0.25
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.path is None) != (self.kind == "procedural"):
            raise ConfigError(f"path: {'needed' if self.path is None else 'has no effect'} for kind {self.kind!r}")
        if not 0 <= self.caption_dropout <= 1 or not 0 <= self.two_object_fraction <= 1:
            raise ConfigError("caption_dropout and two_object_fraction are shares in [0, 1]")


class Source(Protocol):
    def prompts(self, draw: int, count: int) -> list[str]: ...

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        """(data [B, ...], prompts); for videos the data are latents at pipeline level [B, F, C, H, W]."""
        ...


def make_source(config: DataConfig, seed: int, vae: VideoAutoencoder) -> Source:
    if config.kind == "procedural":
        return ProceduralSource(config, seed, vae)
    return StoredSource(config, seed)


class ProceduralSource:
    """Captioned clips of moving shapes, rendered when asked for."""

    def __init__(self, config: DataConfig, seed: int, vae: VideoAutoencoder) -> None:
        self.config, self.seed, self.vae = config, seed, vae

    def _batch(self, draw: int, count: int, num_frames: int):
        return procedural_batch(
            self.seed, draw, batch_size=count, num_frames=num_frames, size=self.config.size,
            two_object_fraction=self.config.two_object_fraction, caption_dropout=self.config.caption_dropout,
        )  # fmt: skip

    def prompts(self, draw: int, count: int) -> list[str]:
        return self._batch(draw, count, 1).captions

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        batch = self._batch(draw, count, self.config.latent_frames * self.vae.temporal_stride)
        return self.vae.encode(batch.pixels).transpose(1, 2), batch.captions


class StoredSource:
    """A prompt file or prepared shards, reshuffled every epoch; the draw number alone decides which items come."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        assert config.path is not None
        self.config, self.seed = config, seed
        self.shards = Shards(config.path) if config.kind == "shards" else None
        self.all_prompts = self.shards.prompts if self.shards else read_prompts(config.path)

    def items(self, draw: int, count: int) -> list[int]:
        """Every item once per epoch, in an order of the epoch's own."""
        total, found = len(self.all_prompts), []
        for number in range(draw * count, (draw + 1) * count):
            epoch, place = divmod(number, total)
            found.append(int(self._order(epoch, total)[place]))
        return found

    def _order(self, epoch: int, total: int) -> Tensor:
        return torch.randperm(total, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def _drop(self, prompts: list[str], draw: int) -> list[str]:
        generator = torch.Generator().manual_seed(self.seed * 7_919 + draw)
        dropped = torch.rand(len(prompts), generator=generator) < self.config.caption_dropout
        return ["" if drop else prompt for prompt, drop in zip(prompts, dropped)]

    def prompts(self, draw: int, count: int) -> list[str]:
        return self._drop([self.all_prompts[item] for item in self.items(draw, count)], draw)

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        if self.shards is None:
            raise ConfigError("data.kind: this stage needs clips; prompts alone are not enough")
        data, prompts = self.shards[self.items(draw, count)]
        return data.float(), self._drop(prompts, draw)
