"""Where a stage's clips and prompts come from. A draw is a number; equal draws give equal samples, on any machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.media.container import MAX_FPS, MAX_SIDE
from sparse_forcing.media.video import DEFAULT_MAX_FRAMES
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.sampling.generation.prompts import read_prompts
from sparse_forcing.scenes.sample import motion_table, shape_table
from sparse_forcing.scenes.worlds.config import GROUNDS, WorldConfig
from sparse_forcing.training.data.procedural import check_world_share, procedural_batch, worlds_in_batch
from sparse_forcing.training.data.shards import Shards
from sparse_forcing.training.data.videos import BadSamples, encode_pixels, list_videos, read_clip, videos_digest

KINDS = ("procedural", "videos", "prompts", "shards")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Clips and prompts of a stage.

    Args:
        kind: procedural (clips made on the fly), videos (a folder of video files, each with its caption in a txt file
            of the same name, or a JSONL or CSV manifest with `video` and `prompt`), prompts (a text file, one per
            line), shards (tensors that `sparse-forcing data encode` or `data ode-pairs` prepared).
        path: file or folder for all but procedural.
        latent_frames: length of a clip; size: pixels of its sides (procedural).
        motion_weights: how much likelier than the rest a motion is in scenes of one object; shape_weights: the same for
            shapes, in all scenes (procedural).
        worlds: how often each kind of world (clips in which something returns) is drawn; world_fraction: share of
            samples that are worlds; world_gap: least and most pixel frames out of sight, None for all that fit
            in the clip; world_grounds: kinds of ground; world_noise: noise of every frame's own, in
            8-bit levels (procedural).
        height, width, fps: what videos are resized, cropped and thinned to; the model's own when None.
        max_bad_samples: videos that may turn out unusable; each is named, one more ends the run.
        stored_text: take text embeddings from the shards, so that no text encoder is loaded.
        caption_dropout: share of samples that train without their caption.
    """

    kind: str = "procedural"
    path: Path | None = None
    latent_frames: int = 10
    size: int = 64
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    max_bad_samples: int = 10
    stored_text: bool = True
    two_object_fraction: float = 0.25
    caption_dropout: float = 0.0
    motion_weights: dict[str, float] | None = None
    shape_weights: dict[str, float] | None = None
    worlds: dict[str, float] | None = None
    world_fraction: float = 0.0
    world_gap: tuple[int, int] | None = None
    world_grounds: tuple[str, ...] = GROUNDS
    world_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.path is None) != (self.kind == "procedural"):
            raise ConfigError(f"path: {'needed' if self.path is None else 'has no effect'} for kind {self.kind!r}")
        if not 0 <= self.caption_dropout <= 1 or not 0 <= self.two_object_fraction <= 1:
            raise ConfigError("caption_dropout and two_object_fraction must lie in [0, 1]")
        if not 1 <= self.latent_frames <= DEFAULT_MAX_FRAMES or self.max_bad_samples < 0:
            raise ConfigError(f"latent_frames must be 1 to {DEFAULT_MAX_FRAMES}, and max_bad_samples not negative")
        for kind, names in (
            ("videos", ("height", "width", "fps")),
            ("procedural", ("motion_weights", "shape_weights", "worlds", "world_gap")),
        ):
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.kind != kind:
                raise ConfigError(f"{given[0]}: has no effect for kind {self.kind!r}")
        sides = {"size": self.size, "height": self.height, "width": self.width}
        for name, value, most in (*((*side, MAX_SIDE) for side in sides.items()), ("fps", self.fps, MAX_FPS)):
            if value is not None and not 0 < value <= most:
                raise ConfigError(f"{name} must be above 0 and at most {most}, got {value}")
        if self.motion_weights is not None:
            if self.two_object_fraction == 1:
                raise ConfigError("motion_weights: has no effect where two_object_fraction is 1")
            motion_table(self.motion_weights)
        if self.shape_weights is not None:
            shape_table(self.shape_weights)
        check_world_share(self.worlds, self.world_fraction)
        self.world_config(1)

    def world_config(self, num_frames: int) -> WorldConfig:
        """Settings of worlds so many pixel frames long."""
        return WorldConfig(
            frames=num_frames, gap=self.world_gap, grounds=tuple(self.world_grounds), frame_noise=self.world_noise
        )


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """What a model takes: pixels to a side and frames per second of its own videos."""

    height: int
    width: int
    fps: float


class Source(Protocol):
    def digest(self) -> str | None:
        """SHA-256 of what the samples come from, None where settings alone say it. Reads whole files."""
        ...

    def prompts(self, draw: int, count: int) -> list[str]: ...

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        """(data [B, ...], prompts); for videos the data are latents at pipeline level [B, F, C, H, W]."""
        ...


def make_source(config: DataConfig, seed: int, vae: VideoAutoencoder, own: VideoFormat) -> Source:
    """The source a config names; `own` is the model's format, which videos get unless the config says otherwise."""
    if config.kind == "procedural":
        return ProceduralSource(config, seed, vae)
    if config.kind == "videos":
        return VideoSource(config, seed, vae, own)
    return StoredSource(config, seed)


def pixel_frames(vae: VideoAutoencoder, latent_frames: int) -> int:
    """Pixel frames of a clip."""
    geometry = VideoGeometry.of(vae, {"patch_size": (1, 1, 1), "chunk_frames": 1})  # of which pixels do not depend
    return geometry.pixel_frames(latent_frames)


class ProceduralSource:
    """Captioned clips of moving shapes, and worlds among them, rendered when asked for."""

    def __init__(self, config: DataConfig, seed: int, vae: VideoAutoencoder) -> None:
        self.config, self.seed, self.vae = config, seed, vae
        self.frames = pixel_frames(vae, config.latent_frames)

    def digest(self) -> None:
        return None

    def _batch(self, draw: int, count: int, num_frames: int, *, world_frames: int | None = None):
        """Pixels [B, 3, F, S, S] and captions; `world_frames` is how long worlds are planned to be, `num_frames` of
        which are drawn."""
        config = self.config
        batch = procedural_batch(
            self.seed,
            draw,
            batch_size=count,
            num_frames=num_frames,
            size=config.size,
            two_object_fraction=config.two_object_fraction,
            caption_dropout=config.caption_dropout,
            motion_weights=config.motion_weights,
            shape_weights=config.shape_weights,
        )
        pixels, captions = batch.pixels, batch.captions
        places, worlds, texts = worlds_in_batch(
            self.seed,
            draw,
            batch_size=count,
            fraction=config.world_fraction,
            weights=config.worlds or {},
            config=config.world_config(world_frames or num_frames),
            caption_dropout=config.caption_dropout,
        )
        if worlds is not None:
            pixels[places] = worlds.render(config.size, frames=range(num_frames)).transpose(1, 2)
            for place, text in zip(places, texts):
                captions[place] = text
        return pixels, captions

    def clip(self, number: int, num_frames: int) -> tuple[Tensor, str]:
        """Pixels [3, F, S, S] and caption of one clip."""
        pixels, captions = self._batch(number, 1, num_frames)
        return pixels[0], captions[0]

    def prompts(self, draw: int, count: int) -> list[str]:
        return self._batch(draw, count, 1, world_frames=self.frames)[1]

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        pixels, captions = self._batch(draw, count, self.frames)
        return encode_pixels(self.vae, pixels), captions


class Shuffled:
    """A list of captioned items, reshuffled every epoch; the draw number alone decides which items come."""

    def __init__(self, config: DataConfig, seed: int, prompts: list[str]) -> None:
        self.config, self.seed, self.all_prompts = config, seed, prompts

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.all_prompts).encode()).hexdigest()

    def items(self, draw: int, count: int) -> list[int]:
        """Every item once per epoch, in an order of the epoch's own."""
        return [self.item(number) for number in range(draw * count, (draw + 1) * count)]

    def item(self, number: int) -> int:
        """The item that comes as the `number`-th sample of the training."""
        total = len(self.all_prompts)
        epoch, place = divmod(number, total)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return int(order[place])

    def prompts(self, draw: int, count: int) -> list[str]:
        return self.drop([self.all_prompts[item] for item in self.items(draw, count)], draw)

    def drop(self, prompts: list[str], draw: int) -> list[str]:
        """Replace a share of the captions by the empty one."""
        generator = torch.Generator().manual_seed(self.seed * 7_919 + draw)
        dropped = torch.rand(len(prompts), generator=generator) < self.config.caption_dropout
        return ["" if drop else prompt for prompt, drop in zip(prompts, dropped)]


class StoredSource(Shuffled):
    """A prompt file or prepared shards."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        assert config.path is not None
        self.shards = Shards(config.path) if config.kind == "shards" else None
        super().__init__(config, seed, self.shards.prompts if self.shards else read_prompts(config.path))
        shape = self.shards.shape("data") if self.shards else None
        if shape is not None and shape[-4] != config.latent_frames:
            raise ConfigError(f"latent_frames: {config.latent_frames}, but {config.path} holds clips of {shape[-4]}")

    def digest(self) -> str:
        return super().digest() if self.shards is None else self.shards.digest()

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        if self.shards is None or self.shards.shape("data") is None:
            raise ConfigError("data.kind: this stage needs clips; prompts alone are not enough")
        data, prompts = self.shards[self.items(draw, count)]
        return data.float(), self.drop(prompts, draw)


class VideoSource(Shuffled):
    """Video files, decoded and encoded when asked for; a file that cannot be used gives way to the next in order."""

    def __init__(self, config: DataConfig, seed: int, vae: VideoAutoencoder, own: VideoFormat) -> None:
        assert config.path is not None
        self.videos, self.vae = list_videos(config.path), vae
        super().__init__(config, seed, [video.prompt for video in self.videos])
        self.format = clip_format(config, own)
        self.frames = pixel_frames(vae, config.latent_frames)
        self.bad = BadSamples(config.max_bad_samples)

    def digest(self) -> str:
        return videos_digest(self.videos)

    def clips(self, draw: int, count: int) -> tuple[Tensor, list[str]]:
        pixels, prompts = zip(*(self._sample(number) for number in range(draw * count, (draw + 1) * count)))
        return encode_pixels(self.vae, torch.stack(pixels)), self.drop(list(prompts), draw)

    def _sample(self, number: int) -> tuple[Tensor, str]:
        """The first usable item from the `number`-th on; past the budget of bad files it raises."""
        for step in range(2 * len(self.videos)):
            video = self.videos[self.item(number + step)]
            if video.path in self.bad:
                continue
            with self.bad.count_failures(video.path):
                size = (self.format.height, self.format.width)
                return read_clip(video.path, frames=self.frames, size=size, fps=self.format.fps), video.prompt
        raise ConfigError(f"{self.config.path}: none of its {len(self.videos)} videos can be used")


def clip_format(config: DataConfig, own: VideoFormat) -> VideoFormat:
    """The format of a config's videos: what it says, the model's own otherwise."""
    return VideoFormat(height=config.height or own.height, width=config.width or own.width, fps=config.fps or own.fps)
