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
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.model_folder.folder import find_model, load_autoencoder, load_text_encoder, read_defaults
from sparse_forcing.sampling.generation.prompts import read_prompts
from sparse_forcing.training.data.shards import ShardContent, read_refused_samples, write_shards
from sparse_forcing.training.data.sources import DataConfig, ProceduralSource, VideoFormat, clip_format, pixel_frames
from sparse_forcing.training.data.videos import BadSamples, content_digests, encode_pixels, list_videos, read_clip
from sparse_forcing.training.engine.settings import check_seed
from sparse_forcing.weights.manifest import folder_hash

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Settings of `data encode`: what to encode, and with what.

    Args:
        model: folder (or `tiny`) whose autoencoder and text encoder are used.
        data: kind videos, procedural, or prompts (text embeddings alone: distillation needs no clips);
            caption_dropout belongs to training and must be 0 here.
        count: clips in all (procedural; of videos and prompts each comes once).
        text: store text embeddings too; negative_prompt: embedded beside the empty one, for distillation.
        dtype: type of what is stored.
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
        if self.data.kind == "shards" or self.data.caption_dropout:
            raise ConfigError("data: encoding takes kind videos, procedural or prompts, without caption_dropout")
        if self.data.kind == "prompts" and not self.text:
            raise ConfigError("text: must be true for kind prompts, of which nothing else is stored")
        if self.dtype not in _TYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(_TYPES)}, got {self.dtype!r}")
        for name in ("count", "per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        check_seed(self.seed)


class _Samples:
    """Numbered samples: pixels [3, F, H, W] (None for bare prompts) and caption, or None for a file without use."""

    def __init__(self, config: EncodeConfig, vae: VideoAutoencoder, own: VideoFormat, refused: list[str]) -> None:
        data = config.data
        self.frames = pixel_frames(vae, data.latent_frames)
        self.videos = list_videos(data.path) if data.kind == "videos" and data.path else []
        self.prompts = read_prompts(data.path) if data.kind == "prompts" and data.path else []
        self.format, self.bad = clip_format(data, own), BadSamples(data.max_bad_samples, tuple(refused))
        self.procedural = ProceduralSource(data, config.seed, vae)
        self.count = len(self.videos) or len(self.prompts) or config.count

    def __call__(self, number: int) -> tuple[Tensor | None, str] | None:
        if self.prompts:
            return None, self.prompts[number]
        if not self.videos:
            return self.procedural.clip(number, self.frames)
        video, size = self.videos[number], (self.format.height, self.format.width)
        with self.bad.count_failures(video.path):
            return read_clip(video.path, frames=self.frames, size=size, fps=self.format.fps), video.prompt
        return None

    def digests(self, numbers: range) -> list[str | None]:
        """Hash of the file of each sample; none where samples are not files."""
        return content_digests(self.videos[number] for number in numbers) if self.videos else []

    def list_samples(self) -> str:
        """Everything that names the samples, for telling two data sets apart."""
        return "\n".join([f"{video.path.name}\n{video.prompt}" for video in self.videos] or self.prompts)


@torch.no_grad()
def encode(config: EncodeConfig, out: Path, device: torch.device | None = None) -> int:
    """Write what is missing; returns the number of shards written now, by all processes of the launch.

    Raises:
        ConfigError: more bad samples than allowed, over all runs into the same folder; or other settings than before.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, dtype = find_model(config.model), _TYPES[config.dtype]
    defaults, vae = read_defaults(folder), load_autoencoder(folder)
    own = VideoFormat(height=defaults.height, width=defaults.width, fps=defaults.fps)
    samples = _Samples(config, vae, own, read_refused_samples(out))
    text_encoder = load_text_encoder(folder) if config.text else None
    for part in (vae, text_encoder):
        if isinstance(part, torch.nn.Module):
            part.to(device)

    def shard(numbers: range) -> ShardContent:
        latents, prompts, refused = [], [], []
        samples.bad.files.update(read_refused_samples(out))  # those of other processes count, too
        for first in range(0, len(numbers), config.batch_size):
            found = {number: samples(number) for number in numbers[first : first + config.batch_size]}
            refused += [str(samples.videos[number].path) for number, sample in found.items() if sample is None]
            prompts += [sample[1] for sample in found.values() if sample is not None]
            pixels = [sample[0] for sample in found.values() if sample is not None and sample[0] is not None]
            if pixels:
                latents.append(encode_pixels(vae, torch.stack(pixels)).to(dtype).cpu())
        tensors = {"data": torch.cat(latents)} if latents else {}
        if text_encoder is not None and prompts:
            tensors["text"] = _embed(text_encoder, prompts, config.batch_size).to(dtype)
        return ShardContent(tensors, prompts, tuple(refused))

    loose = list(dict.fromkeys(["", config.negative_prompt]))
    written = write_shards(
        out,
        samples.count,
        shard,
        per_shard=config.per_shard,
        about=_about(config, folder, samples.list_samples()),
        loose_text=(loose, lambda prompts: _embed(text_encoder, prompts, 1).to(dtype)) if text_encoder else None,
        sources=samples.digests,
        progress=say,
    )
    bad, budget = len(set(read_refused_samples(out))), config.data.max_bad_samples
    if bad > budget:  # found by several processes at the same time, each of which was within the budget
        raise ConfigError(f"{bad} bad samples exceed max_bad_samples {budget}; the shards' JSON files name them")
    return written


def _about(config: EncodeConfig, folder: Path, listing: str) -> dict[str, Any]:
    """What the stored tensors depend on."""
    return {
        "kind": "latents",
        **settings_and_samples(config, listing),
        "autoencoder": folder_hash(folder / "vae"),
        "text_encoder": folder_hash(folder / "text_encoder") if config.text else None,
    }


def settings_and_samples(config: Any, listing: str) -> dict[str, Any]:
    """A data config without what only says in which portions the work is done, and a hash of the samples' names."""
    settings = to_plain(config)
    for name in ("batch_size", "per_shard", "count"):
        del settings[name]
    del settings["data"]["max_bad_samples"]
    return {"config": settings, "samples": hashlib.sha256(listing.encode()).hexdigest()}


def _embed(text_encoder: Any, prompts: list[str], batch: int) -> Tensor:
    return torch.cat([text_encoder.encode(prompts[i : i + batch]).cpu() for i in range(0, len(prompts), batch)])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
