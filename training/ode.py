"""Recipe: causal start by ODE regression: the student learns to jump from a teacher's trajectory to its end.

Two steps, one config:

* `make_pairs` integrates the teacher's ODE with guidance and keeps the states at the student's noise levels. The levels
  are *exactly* the student's: a teacher's grid that does not contain them is refused (Self-Forcing's own script used
  shift 8 for a student of shift 5, and the pairs did not fit).
* `train` picks one state per chunk and regresses x0, block-causally, at the student's timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.attention import ParallelAttention, block_causal_mask
from sparse_forcing.errors import ConfigError
from sparse_forcing.flow import NUM_TRAIN_TIMESTEPS, shift_sigma
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.samplers import guided
from sparse_forcing.sampling.schedules import SamplerConfig, few_step_timesteps
from sparse_forcing.training.data.shards import write_shards
from sparse_forcing.training.data.sources import DataConfig, StoredSource, make_source
from sparse_forcing.training.loop import LoopConfig, run
from sparse_forcing.training.losses import ode_inputs, ode_regression_loss, per_chunk
from sparse_forcing.training.optim import OptimizerConfig
from sparse_forcing.training.stage import OneNetwork, autocast, draw_number, generators

_GRID_TOLERANCE = 1e-2
"""Timesteps that are closer than this are the same (the student's table is float32)."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How trajectories are made.

    Args:
        teacher: pipeline folder of the bidirectional teacher.
        steps: Euler steps of the teacher; guidance_scale: classifier-free weight w of u + w (c - u).
        count, per_shard, batch_size: pairs in all, per file, per forward pass.
    """

    teacher: str = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    steps: int = 48
    guidance_scale: float = 6.0
    negative_prompt: str = ""
    count: int = 1024
    per_shard: int = 64
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """ODE regression. `data` names shards that `make_pairs` wrote with the same `sampler`."""

    loop: LoopConfig
    data: DataConfig
    model: str = "tiny"
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(betas=(0.9, 0.999)))
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        if self.data.kind != "shards":
            raise ConfigError("data.kind: ODE regression reads shards of trajectories; make them with make_pairs")
        if self.memory is not None and self.memory.kind == "sparse":
            raise ConfigError("memory.kind: ODE regression sees noisy context in parallel; use full, window or sink")

    @property
    def shift(self) -> float:
        return self.sampler.shift


def kept_steps(config: PairsConfig) -> tuple[Tensor, list[int]]:
    """The teacher's sigmas [steps + 1] and the places of the student's levels among them, the end included.

    Raises:
        ConfigError: the student's timesteps are not on the teacher's grid.
    """
    sigmas = shift_sigma(torch.linspace(1, 0, config.steps + 1), config.sampler.shift)
    wanted = few_step_timesteps(config.sampler)
    distance = (sigmas[None] * NUM_TRAIN_TIMESTEPS - wanted[:, None]).abs()
    if distance.min(1).values.max() > _GRID_TOLERANCE:
        raise ConfigError(
            f"steps: {config.steps} teacher steps do not pass through the student's timesteps "
            f"{[round(t, 2) for t in wanted.tolist()]}; use a multiple of {config.sampler.steps}"
        )
    return sigmas, [*distance.argmin(1).tolist(), config.steps]


@torch.no_grad()
def make_pairs(config: PairsConfig, out: Path, device: torch.device | None = None) -> int:
    """Write teacher trajectories [S + 1, F, C, H, W], noise to data, as shards; returns how many were missing."""
    device = device or torch.device("cpu")
    pipe = SparseForcingPipeline.from_pretrained(config.teacher).to(device)
    source = make_source(config.data, config.seed, pipe.vae)
    sigmas, kept = kept_steps(config)
    prompts = [prompt for draw in range(config.count) for prompt in source.prompts(draw, 1)]
    height, width = pipe.geometry.latent_size(pipe.config.height, pipe.config.width)
    shape = (config.data.latent_frames, pipe.vae.latent_channels, height, width)

    def trajectories(first: int, part: list[str]) -> Tensor:
        batches = []
        for start in range(0, len(part), config.batch_size):
            batch = part[start : start + config.batch_size]
            noise = torch.stack(
                [torch.randn(shape, generator=generators(config.seed, first + start + i, 1, stream=1)[0])
                 for i in range(len(batch))]
            )  # fmt: skip
            batches.append(integrate(pipe, noise.to(device), batch, sigmas, kept, config))
        return torch.cat(batches)

    about = {
        "kind": "ode trajectories", "timesteps": few_step_timesteps(config.sampler).tolist(), "steps": config.steps,
        "shift": config.sampler.shift, "guidance_scale": config.guidance_scale, "seed": config.seed,
        "weights": pipe.weights_sha256, "shape": [len(kept), *shape],
    }  # fmt: skip
    return write_shards(out, prompts, trajectories, per_shard=config.per_shard, about=about)


def integrate(
    pipe: SparseForcingPipeline, x: Tensor, prompts: list[str], sigmas: Tensor, kept: list[int], config: PairsConfig
) -> Tensor:
    """Euler steps of the guided teacher from noise x [B, F, C, H, W]: the kept states [B, S + 1, F, C, H, W]."""
    text, negative = (pipe.text_encoder.encode(p) for p in (prompts, [config.negative_prompt] * len(prompts)))
    text, states = torch.cat([text, negative]), []
    for step, sigma in enumerate(sigmas):
        if step in kept:
            states.append(x)
        if step < config.steps:
            t = (sigma * NUM_TRAIN_TIMESTEPS).expand(2 * len(x)).to(x.device)
            flow = pipe.transformer(torch.cat([x, x]).transpose(1, 2), t, text).transpose(1, 2)
            x = x + guided(flow, config.guidance_scale) * (sigmas[step + 1] - sigma).to(x)
    return torch.stack(states, 1).cpu()


class OdeRecipe(OneNetwork):
    """State and steps of one run."""

    config: OdeConfig

    def __init__(self, config: OdeConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.timesteps = few_step_timesteps(config.sampler)
        assert isinstance(self.source, StoredSource)
        assert self.source.shards is not None
        made_for = self.source.shards.about.get("timesteps")
        if made_for is None or not torch.allclose(torch.tensor(made_for), self.timesteps, atol=_GRID_TOLERANCE):
            raise ConfigError(
                f"data.path: trajectories were kept at timesteps {made_for}, the student's are "
                f"{self.timesteps.tolist()}; make the pairs with the same sampler"
            )

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """The one loss of a micro-batch."""
        loop = self.config.loop
        draw = draw_number(loop, step, micro_batch)
        trajectory, prompts = self.source.clips(draw, loop.micro_batch)
        trajectory = trajectory.to(self.device)
        frames = trajectory.shape[2]
        chunks = self.chunks(frames)
        with torch.no_grad():
            text = self.pipe.text_encoder.encode(prompts)
        sources = generators(loop.seed, draw, len(trajectory), stream=2)
        draws = torch.stack([torch.randint(0, len(self.timesteps), (frames,), generator=g) for g in sources])
        index = per_chunk(draws, chunks).to(self.device)
        timestep, x_t = self.timesteps.to(self.device)[index], ode_inputs(trajectory, index)
        window = self.config.memory.window if self.config.memory else None
        sink = self.config.memory.sink if self.config.memory else 0
        policy = ParallelAttention(frames, block_causal_mask(chunks, window=window, sink=sink))
        with autocast(self.device, loop):
            flow = self.model(x_t.transpose(1, 2), timestep, text, policy=policy).transpose(1, 2)
        yield ode_regression_loss(flow.float(), x_t, trajectory[:, -1], timestep, self.schedule)


def train(config: OdeConfig, out: Path) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: OdeRecipe(config, accelerator), config.loop, config, out)
