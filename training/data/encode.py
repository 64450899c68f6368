"""Encode captioned clips once: latents and text embeddings as shards, so that training loads neither encoder.

`sparse-forcing data encode OUTPUT --config x.yaml` runs this, with any model folder's autoencoder and text encoder.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.config import to_plain
from sparse_forcing.errors import ConfigError
from sparse_forcing.pipeline import find_model, load_autoencoder, load_text_encoder, read_defaults
from sparse_forcing.training.data.shards import ShardContent, refused_samples, write_shards
from sparse_forcing.training.data.sources import DataConfig, ProceduralSource, VideoFormat, clip_format, pixel_frames
from sparse_forcing.training.data.videos import BadSamples, CaptionedVideo, encode_pixels, list_videos, read_clip
from sparse_forcing.vae import VideoAutoencoder
from sparse_forcing.weights.manifest import folder_hash

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What to encode, and with what.

    Args:
        model: folder (or `tiny`) whose autoencoder and text encoder are used.
        data: kind videos or procedural; caption_dropout belongs to training and must be 0 here.
        count: clips in all (procedural; videos: each file once).
        text: store text embeddings too; negative_prompt: embedded beside the empty one, for distillation.
        dtype: of what is stored.
        per_shard: clips of a file. The clips of one batch are one forward pass of the autoencoder.
    """

    model: str = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    count: int = 1024
    text: bool = True
    negative_prompt: str = ""
    dtype: str = "float32"
    per_shard: int = 64
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data.kind not in ("videos", "procedural") or self.data.caption_dropout:
            raise ConfigError("data: encoding takes kind videos or procedural, without caption_dropout")
        if self.dtype not in _TYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(_TYPES)}, got {self.dtype!r}")
        for name in ("count", "per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")


class _Clips:
    """Numbered clips: pixels [3, F, H, W] and caption, or None for a file that cannot be used."""

    def __init__(self, config: EncodeConfig, vae: VideoAutoencoder, own: VideoFormat, refused: list[str]) -> None:
        data = config.data
        self.frames = pixel_frames(vae, data.latent_frames)
        self.videos = list_videos(data.path) if data.path else []
        self.format, self.bad = clip_format(data, own), BadSamples(data.max_bad_samples, tuple(refused))
        self.procedural = ProceduralSource(data, config.seed, vae)
        self.count = len(self.videos) or config.count

    def __call__(self, number: int) -> tuple[Tensor, str] | None:
        if not self.videos:
            batch = self.procedural._batch(number, 1, self.frames)
            return batch.pixels[0], batch.captions[0]
        video, size = self.videos[number], (self.format.height, self.format.width)
        with self.bad.counting(video.path):
            return read_clip(video.path, frames=self.frames, size=size, fps=self.format.fps), video.prompt
        return None


@torch.no_grad()
def encode(config: EncodeConfig, out: Path, device: torch.device | None = None) -> int:
    """Write what is missing; returns the number of shards written now.

    Raises:
        ConfigError: more bad samples than allowed, over all runs into the same folder; or other settings than before.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, dtype = find_model(config.model), _TYPES[config.dtype]
    defaults, vae = read_defaults(folder), load_autoencoder(folder)
    assert isinstance(vae, torch.nn.Module)
    vae.to(device)
    own = VideoFormat(height=defaults.height, width=defaults.width, fps=defaults.fps)
    clips = _Clips(config, vae, own, refused_samples(out))
    text_encoder = load_text_encoder(folder) if config.text else None
    if isinstance(text_encoder, torch.nn.Module):
        text_encoder.to(device)

    def shard(numbers: range) -> ShardContent:
        latents, prompts, refused = [], [], []
        for first in range(0, len(numbers), config.batch_size):
            found = {number: clips(number) for number in numbers[first : first + config.batch_size]}
            usable = [clip for clip in found.values() if clip is not None]
            refused += [str(clips.videos[number].path) for number, clip in found.items() if clip is None]
            if usable:
                latents.append(encode_pixels(vae, torch.stack([pixels for pixels, _ in usable])).to(dtype).cpu())
                prompts += [prompt for _, prompt in usable]
        tensors = {"data": torch.cat(latents)} if latents else {}
        if text_encoder is not None and prompts:
            tensors["text"] = _embed(text_encoder, prompts, config.batch_size).to(dtype)
        return ShardContent(tensors, prompts, tuple(refused))

    loose = list(dict.fromkeys(["", config.negative_prompt]))
    return write_shards(
        out, clips.count, shard, per_shard=config.per_shard, about=_about(config, folder, clips.videos), progress=say,
        loose_text=(loose, lambda prompts: _embed(text_encoder, prompts, 1).to(dtype)) if text_encoder else None,
    )  # fmt: skip


def _about(config: EncodeConfig, folder: Path, videos: list[CaptionedVideo]) -> dict[str, Any]:
    """What the stored tensors depend on."""
    settings = to_plain(config)
    for name in ("batch_size", "per_shard", "count"):
        del settings[name]
    del settings["data"]["max_bad_samples"]
    listing = "".join(f"{video.path.name}\n{video.prompt}\n" for video in videos)
    return {
        "kind": "latents", "config": settings, "videos": hashlib.sha256(listing.encode()).hexdigest(),
        "autoencoder": folder_hash(folder / "vae"),
        "text_encoder": folder_hash(folder / "text_encoder") if config.text else None,
    }  # fmt: skip


def _embed(text_encoder: Any, prompts: list[str], batch: int) -> Tensor:
    return torch.cat([text_encoder.encode(prompts[i : i + batch]).cpu() for i in range(0, len(prompts), batch)])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
