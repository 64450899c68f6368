"""Recipe: causal start by consistency distillation: every noise level of a teacher's path leads to the same x0.

The student maps a noisy chunk, beside clean ones, to x0. Its target is what its own averaged weights make of the chunk
one level below, where one Euler step of the teacher leads; the last step ends at x0 itself. No trajectories are stored,
unlike for `ode` (Causal Forcing++, arXiv 2605.15141; consistency models, arXiv 2303.01469).

A causal teacher (the student's own start, `teacher_window`) sees what the student sees, and its path from a noisy chunk
has one end. A bidirectional one sees all chunks of a clip equally noisy, so a clip has one level, and what it knows of
later chunks the student can only average over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.flow import (
    NUM_TRAIN_TIMESTEPS,
    FlowSchedule,
    SamplerConfig,
    add_noise,
    euler_sigmas,
    few_step_timesteps,
    flow_to_x0,
)
from sparse_forcing.model_folder.folder import find_model, load_transformer
from sparse_forcing.sampling.samplers import guide
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.loop import run
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.losses.flow_matching import consistency_target
from sparse_forcing.training.recipes.shared import (
    OneNetwork,
    autocast,
    draw_number,
    generators,
    noise_like,
    prepare,
)
from sparse_forcing.training.recipes.teacher_forcing import flow_beside, flow_through_memory
from sparse_forcing.training.recipes.validation import swap_in_average


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of a causal student.

    Args:
        teacher: pipeline folder (or `tiny-base`) whose transformer's path is learned.
        model: pipeline folder (or `tiny`) that gives text encoder, autoencoder and the student's starting weights.
        teacher_window: latent frames that a causal teacher sees, the predicted chunk included; None: a bidirectional
            one, to which all chunks of a clip are equally noisy.
        teacher_steps: Euler steps of the teacher from noise to the end, even before the shift; the levels of the
            sampler when None. With a multiple of the sampler's steps its evenly spaced levels are among them.
        guidance_scale: of the teacher; the student needs none. negative_prompt: what it is guided away from.
        memory: memory of the past that a chunk of the student sees; the model's default when None.
        cache_gradient: through a memory, "detached" or "clean", as in the stage `forcing`.
        sampler: few_step; the trained model's.
        ema_decay: of the averaged weights, which are the target's and what is exported.
        lora: train adapters instead of all weights.
    """

    loop: LoopConfig
    teacher: str
    model: str = "tiny"
    teacher_window: int | None = None
    teacher_steps: int | None = None
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig | None = None
    cache_gradient: str = "detached"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.98)))
    ema_decay: float = 0.95
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.sampler.kind != "few_step" or self.sampler.guidance_scale != 1:
            raise ConfigError("sampler: a student is distilled with kind few_step and guidance_scale 1")
        if self.teacher_window is not None and self.teacher_window < 1:
            raise ConfigError(f"teacher_window: must be at least 1 latent frame, got {self.teacher_window}")
        if self.teacher_steps is not None and not self.sampler.steps <= self.teacher_steps <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(
                f"teacher_steps: expected {self.sampler.steps} (the sampler's steps) to {NUM_TRAIN_TIMESTEPS}, "
                f"got {self.teacher_steps}"
            )
        if not self.guidance_scale >= 0 or not 0 < self.ema_decay < 1:
            raise ConfigError("guidance_scale must not be negative, ema_decay must be in (0, 1)")
        if self.cache_gradient not in ("detached", "clean"):
            raise ConfigError(f"cache_gradient: expected detached or clean, got {self.cache_gradient!r}")

    @property
    def shift(self) -> float:
        """Shift of the noise grid, which is the sampler's."""
        return self.sampler.shift


@dataclass(frozen=True)
class Clips:
    """A micro-batch: latents [B, F, C, H, W] of true clips, text and negative [B, T, text_dim], sizes of the chunks."""

    latents: Tensor
    text: Tensor
    negative: Tensor
    chunks: list[int]


class ConsistencyRecipe(OneNetwork):
    """State and steps of one run."""

    loss_name = "consistency"
    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.pipe.defaults = replace(self.pipe.defaults, sampler=config.sampler, memory=self.memory)
        self.teacher = load_transformer(find_model(config.teacher)).eval()
        prepare(self.teacher, config.loop, self.device, train=False)
        self.sigmas = student_levels(config).to(self.device)

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """The one loss of a micro-batch."""
        config = self.config
        draw = draw_number(config.loop, step, micro_batch)
        latents, prompts = self.source.clips(draw, config.loop.micro_batch)
        latents = latents.to(self.device)
        with torch.no_grad():
            text, negative = (self.pipe.text.encode(p) for p in (prompts, [config.negative_prompt]))
        clips = Clips(latents, text, negative.expand_as(text), self.chunks(latents.shape[1]))
        sources = generators(config.loop.seed, draw, len(latents), stream=2)
        level = self.levels(sources, clips.chunks)
        sigma, following = self.sigmas[level], self.sigmas[level + 1]
        noisy = add_noise(latents, noise_like(latents, sources), sigma)
        with autocast(self.device, config.loop):
            target = self.target(noisy, sigma, following, clips)
            flow = self.student(noisy, sigma, clips)
        yield (flow_to_x0(flow.float(), noisy, sigma) - target).square().mean()

    def levels(self, sources: list[torch.Generator], chunks: list[int]) -> Tensor:
        """[B, F] numbers of noise levels, one per chunk (a bidirectional teacher: per clip)."""
        sizes = [sum(chunks)] if self.config.teacher_window is None else chunks
        drawn = [torch.randint(0, len(self.sigmas) - 1, (len(sizes),), generator=g) for g in sources]
        return torch.stack(drawn).repeat_interleave(torch.tensor(sizes), 1).to(self.device)

    @torch.no_grad()
    def target(self, noisy: Tensor, sigma: Tensor, following: Tensor, clips: Clips) -> Tensor:
        """[B, F, C, H, W] x0 that the averaged weights predict where the teacher's step from sigma to `following`, both
        [B, F], leads."""

        def average(x: Tensor, sigma: Tensor) -> Tensor:
            with swap_in_average(self.model, self.ema):
                return self.student(x, sigma, clips)

        return consistency_target(lambda x, sigma: self.teacher_flow(x, sigma, clips), average, noisy, sigma, following)

    def student(self, x: Tensor, sigma: Tensor, clips: Clips) -> Tensor:
        """Flow of x at levels sigma, every chunk beside the clean ones before it that its memory keeps."""
        timestep, text, chunks = NUM_TRAIN_TIMESTEPS * sigma, clips.text, clips.chunks
        if self.memory.kind == "full":
            return flow_beside(self.model, x, clips.latents, timestep, text, chunks)
        gradient = self.config.cache_gradient
        return flow_through_memory(
            self.model, self.memory, x, clips.latents, timestep, text, chunks, cache_gradient=gradient
        )[0]

    @torch.no_grad()
    def teacher_flow(self, x: Tensor, sigma: Tensor, clips: Clips) -> Tensor:
        """Flow of the teacher, guided if asked for."""
        config, clean, text, t = self.config, clips.latents, clips.text, NUM_TRAIN_TIMESTEPS * sigma
        if config.guidance_scale != 1:
            x, clean, t = (torch.cat([part, part]) for part in (x, clean, t))
            text = torch.cat([text, clips.negative.to(text)])
        if config.teacher_window is None:
            policy = ParallelAttention(x.shape[1])
            flow = self.teacher(x.transpose(1, 2), t[:, 0], text, policy=policy).transpose(1, 2)
        else:
            flow = flow_beside(self.teacher, x, clean, t, text, clips.chunks, window=config.teacher_window)
        return flow if config.guidance_scale == 1 else guide(flow, config.guidance_scale)


def student_levels(config: ConsistencyConfig) -> Tensor:
    """[N + 1] noise levels from the first to 0 that the teacher's steps connect."""
    if config.teacher_steps is not None:
        return euler_sigmas(replace(config.sampler, steps=config.teacher_steps, step_list=None))
    sigmas = FlowSchedule(config.shift).sigma_at(few_step_timesteps(config.sampler))
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def train(config: ConsistencyConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: ConsistencyRecipe(config, accelerator), config.loop, config, out, resume)
