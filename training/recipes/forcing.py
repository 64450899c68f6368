"""Recipe: flow matching of a video model, as a bidirectional teacher or as the start of a causal student.

* `bidirectional`: one noise level per clip, every frame sees every frame; the teacher (real score) of distillation.
* `diffusion`: one noise level per chunk, chunks see earlier noisy chunks (diffusion forcing).
* `teacher`: one noise level per chunk, chunks see earlier clean chunks (teacher forcing).

With a memory other than `full`, teacher forcing runs chunk by chunk through that memory, exactly as inference does:
window, block selection, eviction and the persistent set are active while the weights learn.

With `guidance_scale` the target is not the data's flow but the guided flow of the starting weights: one pass then does
what took two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention, block_causal_mask
from sparse_forcing.model.flow import SamplerConfig, add_noise, few_step_timesteps
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.samplers import guide
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.loop import run
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.losses.flow_matching import scheduled_flow_loss, unit_variance_weight
from sparse_forcing.training.recipes.shared import (
    OneNetwork,
    add_selector,
    autocast,
    draw_number,
    export_pipeline,
    generators,
    noise_like,
    prepare,
)
from sparse_forcing.training.recipes.teacher_forcing import flow_beside, flow_through_memory

MODES = ("bidirectional", "diffusion", "teacher")


@dataclass(frozen=True, kw_only=True)
class ForcingConfig:
    """Flow matching of one model.

    Args:
        model: pipeline folder (or `tiny`) that gives text encoder, autoencoder and the starting weights.
        memory: memory of the past that a chunk sees; the model's default when None.
        shift: shift of the noise grid that levels are drawn from.
        weighting: "schedule" (Self-Forcing's bell around t = 500), or "unit_variance" (squared error of the
            preconditioned network output, for models with latent_std).
        context_noise: share of the range up to which the clean context is noised (teacher forcing), 0 for none.
        cache_gradient: through a memory, "detached" (the clean chunks' keys and values are constants: half the
            activations) or "clean" (they learn too, as in the parallel form, which a `full` memory always takes).
        guidance_scale: scale of the starting weights, whose flow with classifier-free guidance is then the target of
            teacher forcing (Meng et al., arXiv 2210.03142); the result needs no guidance. 1 for the data's flow.
        guidance_window: latent frames that the starting weights see for it, the predicted chunk included; as many as
            the memory when None.
        sampler: sampler of the trained model; the starting model's when None.
        sampler_level_fraction: share of the chunks whose noise level is one of a few_step sampler's, not any of the
            grid. Needs weighting unit_variance: the bell gives pure noise, where a sampler begins, no weight.
        learned_selector: give the model a learned block selector if it has none: it trains through its coarse branch,
            and through its distillation loss when `selector_weight` is not 0.
        selector_weight: weight of the selector's distillation loss; needs a sparse memory and a learned selector.
        selector_layers: layers the distillation loss looks at per step, drawn anew each time.
        lora: train adapters instead of all weights.
    """

    loop: LoopConfig
    model: str = "tiny"
    mode: str = "teacher"
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.98)))
    ema_decay: float = 0.99
    shift: float = 5.0
    weighting: str = "schedule"
    context_noise: float = 0.0
    cache_gradient: str = "detached"
    guidance_scale: float = 1.0
    guidance_window: int | None = None
    sampler: SamplerConfig | None = None
    sampler_level_fraction: float = 0.0
    learned_selector: bool = False
    selector_weight: float = 0.0
    selector_layers: int = 2
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.weighting not in ("schedule", "unit_variance"):
            raise ConfigError(f"weighting: expected schedule or unit_variance, got {self.weighting!r}")
        if not 0 <= self.context_noise < 1 or not 0 < self.ema_decay < 1 or self.selector_weight < 0:
            raise ConfigError("context_noise must be in [0, 1), ema_decay in (0, 1), selector_weight not negative")
        if self.guidance_scale != 1 and self.mode != "teacher":
            raise ConfigError(f"guidance_scale: {self.guidance_scale:g} needs mode: teacher, got {self.mode}")
        if self.cache_gradient not in ("detached", "clean"):
            raise ConfigError(f"cache_gradient: expected detached or clean, got {self.cache_gradient!r}")
        if self.guidance_window is not None and (self.guidance_window < 1 or self.guidance_scale == 1):
            raise ConfigError(f"guidance_window: {self.guidance_window} must be positive and needs a guidance_scale")
        if not 0 <= self.sampler_level_fraction <= 1:
            raise ConfigError(f"sampler_level_fraction: must lie in [0, 1], got {self.sampler_level_fraction:g}")
        if self.sampler_level_fraction and (self.sampler is None or self.sampler.kind != "few_step"):
            raise ConfigError("sampler_level_fraction: needs a sampler of kind few_step")
        if self.sampler_level_fraction and self.weighting == "schedule":
            raise ConfigError(
                "sampler_level_fraction: needs weighting: unit_variance; schedule gives pure noise no weight"
            )
        if self.mode != "teacher" and self.memory is not None and not self.memory.sees_whole_frames:
            kind = self.memory.kind
            raise ConfigError(f"memory.kind: {kind} is trained chunk by chunk, which only mode: teacher does")


class ForcingRecipe(OneNetwork):
    """State and steps of one run."""

    config: ForcingConfig

    def __init__(self, config: ForcingConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        if config.mode != "teacher" and config.memory is None:
            self.memory = replace(self.memory, kind="full")
        if config.selector_weight and not (self.memory.kind == "sparse" and self.model.selectors):
            raise ConfigError("selector_weight: needs memory.kind sparse and a model with a learned selector")
        if self.guide is not None:
            prepare(self.guide, config.loop, self.device, train=False)

    def load(self) -> SparseForcingPipeline:
        pipe = super().load()
        self.guide = copy.deepcopy(pipe.transformer).eval() if self.config.guidance_scale != 1 else None
        if self.config.learned_selector:
            add_selector(pipe, self.config.memory)
        return pipe

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """The one loss of a micro-batch."""
        config = self.config
        draw = draw_number(config.loop, step, micro_batch)
        latents, prompts = self.source.clips(draw, config.loop.micro_batch)
        latents = latents.to(self.device)
        with torch.no_grad():
            text = self.pipe.text.encode(prompts)
        sources = generators(config.loop.seed, draw, len(latents), stream=2)
        chunks = self.chunks(latents.shape[1])
        timestep, noise = self.levels(sources, chunks), noise_like(latents, sources)
        noisy = add_noise(latents, noise, self.schedule.sigma_at(timestep))
        with autocast(self.device, config.loop):
            flow, extra = self.flow(noisy, latents, timestep, text, chunks, sources)
            target = (
                noise - latents
                if self.guide is None
                else self.predict_guided_flow(noisy, latents, timestep, text, chunks)
            )
        yield self.flow_loss(flow, target, timestep) + config.selector_weight * extra

    def levels(self, sources: list[torch.Generator], chunks: list[int]) -> Tensor:
        """[B, F] timesteps from the shifted grid or the sampler's list, one per chunk (or per clip)."""
        config, grid = self.config, self.schedule.timesteps
        count = 1 if config.mode == "bidirectional" else len(chunks)
        index = torch.stack([torch.randint(0, len(grid), (count,), generator=g) for g in sources])
        timestep = grid[index]
        if config.sampler is not None and config.sampler_level_fraction:
            steps = few_step_timesteps(config.sampler)
            used = torch.stack([torch.rand(count, generator=g) for g in sources]) < config.sampler_level_fraction
            timestep = torch.where(used, steps[index % len(steps)], timestep)
        frames = torch.tensor([sum(chunks)] if count == 1 else chunks)
        return timestep.repeat_interleave(frames, 1).to(self.device)

    def flow(
        self,
        noisy: Tensor,
        clean: Tensor,
        timestep: Tensor,
        text: Tensor,
        chunks: list[int],
        sources: list[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """Flow [B, F, C, H, W] of the noisy latents, and the selector's loss (0 without one)."""
        frames, nothing = noisy.shape[1], noisy.new_zeros(())
        window, sink = self.memory.window, self.memory.sink
        if self.config.mode == "bidirectional":
            return self.run(noisy, timestep[:, 0], text, ParallelAttention(frames)), nothing
        if self.config.mode == "diffusion":
            mask = block_causal_mask(chunks, window=window, sink=sink)
            return self.run(noisy, timestep, text, ParallelAttention(frames, mask)), nothing
        level = self.context_levels(sources, chunks)
        context = add_noise(clean, noise_like(clean, sources), level) if self.config.context_noise else clean
        if self.memory.kind == "full":
            return flow_beside(self.model, noisy, context, timestep, text, chunks, level=1000 * level), nothing
        distilled = self.draw_layers(sources[0]) if self.config.selector_weight else frozenset()
        flow, losses = flow_through_memory(
            self.model,
            self.memory,
            noisy,
            context,
            timestep,
            text,
            chunks,
            level=1000 * level,
            cache_gradient=self.config.cache_gradient,
            distilled=distilled,
        )
        return flow, torch.stack(losses).mean() if losses else nothing

    @torch.no_grad()
    def predict_guided_flow(
        self, noisy: Tensor, clean: Tensor, timestep: Tensor, text: Tensor, chunks: list[int]
    ) -> Tensor:
        """[B, F, C, H, W] flow of the starting weights with guidance; they see the clean chunks of the window."""
        assert self.guide is not None
        window = self.config.guidance_window or self.memory.window
        texts = torch.cat([text, self.pipe.text.encode([""] * len(text)).to(text)])
        x, context, t = (torch.cat([part, part]) for part in (noisy, clean, timestep))
        flow = flow_beside(self.guide, x, context, t, texts, chunks, window=window)
        return guide(flow, self.config.guidance_scale)

    def run(self, noisy: Tensor, timestep: Tensor, text: Tensor, policy: ParallelAttention) -> Tensor:
        return self.model(noisy.transpose(1, 2), timestep, text, policy=policy).transpose(1, 2)

    def context_levels(self, sources: list[torch.Generator], chunks: list[int]) -> Tensor:
        """[B, F] noise of the context: squared uniform draws, so that most of it is nearly clean."""
        level = torch.stack([torch.rand(len(chunks), generator=g) for g in sources]) ** 2 * self.config.context_noise
        return level.repeat_interleave(torch.tensor(chunks), 1).to(self.device)

    def draw_layers(self, source: torch.Generator) -> frozenset[int]:
        layers = len(self.model.blocks)
        order = torch.randperm(layers, generator=source)
        return frozenset(order[: min(self.config.selector_layers, layers)].tolist())

    def flow_loss(self, flow: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
        if self.config.weighting == "schedule":
            return scheduled_flow_loss(flow, target, timestep, self.schedule)
        weight = unit_variance_weight(timestep.cpu() / 1000, self.model.config.latent_std)
        error = (flow.float() - target).square().transpose(1, 2)
        return (error * (weight.to(error) if isinstance(weight, Tensor) else weight)).mean()

    def export(self, folder: Path) -> None:
        sampler = self.config.sampler or self.pipe.defaults.sampler
        if self.guide is not None:
            sampler = replace(sampler, guidance_scale=1.0)
        changes: dict[str, object] = {"memory": self.memory, "sampler": sampler}
        export_pipeline(self.pipe, self.config.model, self.model, self.ema, folder, lora=self.config.lora, **changes)


def train(config: ForcingConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: ForcingRecipe(config, accelerator), config.loop, config, out, resume)
