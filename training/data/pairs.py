"""ODE pairs: a teacher's guided trajectories, kept at exactly the student's noise levels, as shards.

A teacher's grid that does not contain the student's levels is refused (Self-Forcing's own script used shift 8 for a
student of shift 5, and the pairs did not fit). `sparse-forcing data ode-pairs` runs this; stage `ode` trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.flow import NUM_TRAIN_TIMESTEPS, SamplerConfig, few_step_timesteps, shift_sigma
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.samplers import guide
from sparse_forcing.training.data.encode import say, settings_and_samples
from sparse_forcing.training.data.shards import ShardContent, write_shards
from sparse_forcing.training.data.sources import DataConfig, Shuffled, VideoFormat, make_source
from sparse_forcing.training.engine.settings import check_seed

GRID_TOLERANCE = 1e-2
"""Timesteps that are closer than this are the same (the student's table is float32)."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How trajectories are made.

    Args:
        teacher: pipeline folder of the bidirectional teacher.
        data: source of the prompts, and length of a clip.
        sampler: the student's; its steps are the noise levels that are kept.
        steps: Euler steps of the teacher; guidance_scale: classifier-free weight w of u + w (c - u).
        dtype: float32 or bfloat16, of what is stored and of the teacher's arithmetic (its steps add up in float32).
        count, per_shard, batch_size: pairs in all, per file, per forward pass.
    """

    teacher: str = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    steps: int = 48
    guidance_scale: float = 6.0
    negative_prompt: str = ""
    dtype: str = "float32"
    count: int = 1024
    per_shard: int = 64
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        for name in ("steps", "count", "per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        check_seed(self.seed)
        if self.steps > NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"steps: at most {NUM_TRAIN_TIMESTEPS}, as there are timesteps, got {self.steps}")


def choose_kept_steps(config: PairsConfig) -> tuple[Tensor, list[int]]:
    """The teacher's sigmas [steps + 1] and the places of the student's levels among them, the end included.

    Raises:
        ConfigError: the student's timesteps are not on the teacher's grid.
    """
    sigmas = shift_sigma(torch.linspace(1, 0, config.steps + 1), config.sampler.shift)
    wanted = few_step_timesteps(config.sampler)
    distance = (sigmas[None] * NUM_TRAIN_TIMESTEPS - wanted[:, None]).abs()
    if distance.min(1).values.max() > GRID_TOLERANCE:
        raise ConfigError(
            f"steps: {config.steps} teacher steps do not pass through the student's timesteps "
            f"{[round(t, 2) for t in wanted.tolist()]}; use a multiple of {config.sampler.steps}"
        )
    return sigmas, [*distance.argmin(1).tolist(), config.steps]


@torch.no_grad()
def make_pairs(config: PairsConfig, out: Path, device: torch.device | None = None) -> int:
    """Write teacher trajectories [S + 1, F, C, H, W], noise to data, and text embeddings as shards; returns how many
    shards were written now, by all processes of the launch."""
    sigmas, kept = choose_kept_steps(config)  # refuses a bad grid before anything is loaded
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = SparseForcingPipeline.from_pretrained(config.teacher, {"transformer": torch.float32}).to(device)
    own = VideoFormat(height=pipe.defaults.height, width=pipe.defaults.width, fps=pipe.defaults.fps)
    source = make_source(config.data, config.seed, pipe.autoencoder, own)
    height, width = pipe.geometry.latent_size(pipe.defaults.height, pipe.defaults.width)
    shape = (config.data.latent_frames, pipe.autoencoder.latent_channels, height, width)
    dtype = getattr(torch, config.dtype)

    def trajectories(items: range) -> ShardContent:
        prompts = [prompt for item in items for prompt in source.prompts(item, 1)]
        text, states = pipe.text.encode(prompts), []
        negative = pipe.text.encode([config.negative_prompt])
        for first in range(0, len(items), config.batch_size):
            batch = items[first : first + config.batch_size]
            noise = torch.stack([torch.randn(shape, generator=make_generator(config.seed, item)) for item in batch])
            part = text[first : first + config.batch_size]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                states.append(integrate(pipe, noise.to(device), part, negative.expand_as(part), sigmas, kept, config))
        return ShardContent({"data": torch.cat(states).to(dtype), "text": text.to(dtype)}, prompts)

    listing = "\n".join(source.all_prompts) if isinstance(source, Shuffled) else ""
    about = {
        "kind": "ode trajectories",
        **settings_and_samples(config, listing),
        "weights": pipe.weights_sha256,
        "timesteps": few_step_timesteps(config.sampler).tolist(),
        "shape": [len(kept), *shape],
    }
    loose = list(dict.fromkeys(["", config.negative_prompt]))
    return write_shards(
        out,
        config.count,
        trajectories,
        per_shard=config.per_shard,
        about=about,
        loose_text=(loose, lambda prompts: pipe.text.encode(prompts).to(dtype)),
        progress=say,
    )


def make_generator(seed: int, item: int) -> torch.Generator:
    """The source of an item's noise."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + item) * 1_048_576 + 1) % 2**64)


def integrate(
    pipe: SparseForcingPipeline,
    x: Tensor,
    text: Tensor,
    negative: Tensor,
    sigmas: Tensor,
    kept: list[int],
    config: PairsConfig,
) -> Tensor:
    """Euler steps of the guided teacher from noise x [B, F, C, H, W]: the kept states [B, S + 1, F, C, H, W]."""
    text, states = torch.cat([text, negative]), []
    for step, sigma in enumerate(sigmas):
        if step in kept:
            states.append(x)
        if step < config.steps:
            t = (sigma * NUM_TRAIN_TIMESTEPS).expand(2 * len(x)).to(x.device)
            flow = pipe.transformer(torch.cat([x, x]).transpose(1, 2), t, text).transpose(1, 2).to(x)
            x = x + guide(flow, config.guidance_scale) * (sigmas[step + 1] - sigma).to(x)
    return torch.stack(states, 1).cpu()
