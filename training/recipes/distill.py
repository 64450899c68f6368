"""Recipe: distil a bidirectional teacher into a few-step causal student on the student's own rollouts (Self-Forcing).

The rollout is the one that inference runs, memory included: a sparse student trains with its window, its block
selection, its evictions and its persistent set. Three networks take part:

* generator: the student; every chunk of a rollout carries gradients in one denoising step, its exit step
* real score: the frozen teacher; fake score (critic): follows the student's distribution by flow matching. Both are
  bidirectional, as in the paper, or causal (`score.causal_window`)

`steps` counts critic updates. The generator is updated before the critic whenever the step is a multiple of
`critic_ratio`, on prompts and noise of its own; each update accumulates its own micro-batches, so accumulation and
ratio do not interfere.

Long tuning: with `windows` > 1 a rollout goes on past the training horizon, window by window, on the same memory. Each
window's loss is taken on the last `rollout_frames` frames, of which only the new ones carry gradients (LongLive's
scheme; unlike it, the windows of a rollout are averaged into one update, so that no checkpoint falls inside a rollout).
Where an autoencoder's first latent frame is a picture alone (Wan's), the first of a later window becomes one for the
scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, make_model_memory
from sparse_forcing.model.flow import FlowSchedule, SamplerConfig
from sparse_forcing.model_folder.folder import find_model, load_transformer
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import TrainingRollout, rollout
from sparse_forcing.training.data.identity import DataIdentity
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.checkpoint import Stateful
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.loop import Recipe, run
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig, make_optimizer
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.losses.distribution_matching import (
    Compared,
    Score,
    ScoreConfig,
    critic_loss,
    dmd_loss,
    make_context,
    make_score,
    score_timestep,
    sid_loss,
)
from sparse_forcing.training.recipes.shared import (
    Metrics,
    add_selector,
    autocast,
    draw_number,
    export_pipeline,
    generators,
    load_pipeline,
    make_own_source,
    noise_like,
    optimizer_step,
    prepare,
    select_trained_part,
)
from sparse_forcing.training.recipes.validation import swap_in_average, write_samples
from sparse_forcing.weights.manifest import model_hash

LOSSES = ("dmd", "sid")
_GENERATOR, _CRITIC = 3, 4
"""Random streams of the two updates of a step."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Self-forcing distillation.

    Args:
        model: pipeline folder (or `tiny`) of the causal start: text encoder, autoencoder, the generator's weights.
        teacher: pipeline folder whose transformer is the real score.
        critic_start: weights that the fake score starts from: "teacher"; "model" when the student knows what the
            teacher does not (guidance, after tiny-guided.yaml) and a fake score would first have to catch up on that;
            or another pipeline folder (Self-Forcing's critic of a 14B teacher is the 1.3B model).
        memory: memory of the rollouts; the model's default when None.
        sampler: few_step; its steps are the student's.
        critic_ratio: critic updates per generator update.
        rollout_frames: latent frames of the first window (the horizon of both scores).
        windows: windows of a rollout, see long tuning above; window_frames: new frames of every later window.
        cache_gradient: "detached" (past keys and values are constants) or "straight_through" (they carry the gradient
            of the pass that made the chunk, as in Self-Forcing's released weights).
        context_noise: noise the finished chunk before its clean pass as Self-Forcing's trainer does.
        ema_start: step from which averages are kept.
        learned_selector: give the model a learned block selector if it has none: it trains through its coarse branch,
            and through its distillation loss when `selector_weight` is not 0.
        selector_weight: weight of the selector's distillation loss (sparse memory with a learned selector).
        lora, critic_lora: train adapters of the generator, of the critic, instead of all their weights.
    """

    loop: LoopConfig
    model: str = "tiny"
    teacher: str = "tiny"
    critic_start: str = "teacher"
    loss: str = "dmd"
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    generator: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=4e-7))
    critic_ratio: int = 5
    rollout_frames: int = 10
    windows: int = 1
    window_frames: int | None = None
    cache_gradient: str = "detached"
    context_noise: bool = False
    negative_prompt: str = ""
    ema_decay: float = 0.99
    ema_start: int = 200
    learned_selector: bool = False
    selector_weight: float = 0.0
    selector_layers: int = 2
    lora: LoraConfig | None = None
    critic_lora: LoraConfig | None = None

    @property
    def critic_model(self) -> str:
        """Model whose weights the fake score starts from."""
        return {"teacher": self.teacher, "model": self.model}.get(self.critic_start, self.critic_start)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.sampler.kind != "few_step" or self.sampler.guidance_scale != 1:
            raise ConfigError("sampler: a student is distilled with kind few_step and guidance_scale 1")
        if min(self.critic_ratio, self.rollout_frames, self.windows) < 1:
            raise ConfigError("critic_ratio, rollout_frames and windows must be at least 1")
        if self.cache_gradient not in ("detached", "straight_through"):
            raise ConfigError(f"cache_gradient: expected detached or straight_through, got {self.cache_gradient!r}")
        if self.windows > 1 and self.cache_gradient != "detached":
            raise ConfigError("cache_gradient: must be detached in long tuning, which frees each window's graph")
        if self.loss == "sid" and (self.score.fake_guidance or self.windows > 1):
            raise ConfigError("loss: sid needs fake_guidance 0 and windows 1")
        if self.window_frames is not None and not 0 < self.window_frames <= self.rollout_frames:
            raise ConfigError(f"window_frames: must be in 1..rollout_frames, got {self.window_frames}")


class DistillRecipe(Recipe):
    """The three networks, their optimizers, and the two updates of a step."""

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        self.config, loop = config, config.loop
        self.device, self.steps = accelerator.device, loop.steps
        teacher = find_model(config.teacher)
        critic = find_model(config.critic_model)
        self.pipe = load_pipeline(config.model, config.data, loop, self.device)
        if config.learned_selector:
            add_selector(self.pipe, config.memory)
        self.model = self.pipe.transformer
        self.memory = config.memory or self.pipe.default_memory
        if config.selector_weight and not (self.memory.kind == "sparse" and self.model.selectors):
            raise ConfigError("selector_weight: needs memory.kind sparse and a model with a learned selector")
        critic_hash = model_hash(critic)
        prepare(self.model, loop, self.device, train=True, lora=config.lora)
        self.fake = load_transformer(critic)  # loaded one after the other: sharded ones leave room for the next
        prepare(self.fake, loop, self.device, train=True, lora=config.critic_lora)
        self.real = load_transformer(teacher)
        prepare(self.real, loop, self.device, train=False)
        self.optimizers = {
            "generator": make_optimizer(self.model, config.generator),
            "critic": make_optimizer(self.fake, config.critic),
        }
        self.ema = ParameterEma(self.model, config.ema_decay)
        self.source = make_own_source(config.data, loop.seed + 1, self.pipe)
        self.schedule = FlowSchedule(config.sampler.shift)
        self.score_schedule = FlowSchedule(config.score.schedule_shift) if config.score.schedule_shift else None
        self.parts: dict[str, Stateful] = {
            "generator": select_trained_part(self.model, config.lora, self.pipe.weights_sha256),
            "critic": select_trained_part(self.fake, config.critic_lora, critic_hash),
            "generator_optimizer": self.optimizers["generator"],
            "critic_optimizer": self.optimizers["critic"],
            "generator_ema": self.ema,
            "data": DataIdentity(self.source, config.data.path),
        }
        self.windows = self._windows()
        self.geometry = (
            f"micro_batch {loop.micro_batch}, {sum(map(sum, self.windows))} latent frames in "
            f"{len(self.windows)} windows, memory {self.memory.kind}"
        )

    def _windows(self) -> list[list[int]]:
        """Chunk sizes of each window."""
        size, config = self.model.config.chunk_frames, self.config
        later = config.window_frames or config.rollout_frames
        for name, frames in (("rollout_frames", config.rollout_frames), ("window_frames", later)):
            if frames % size:
                raise ConfigError(f"{name}: {frames} is not a multiple of the model's chunk of {size} frames")
        if config.windows > 1 and self.pipe.autoencoder.first_frame_alone and later == config.rollout_frames:
            raise ConfigError(
                f"window_frames: must be below rollout_frames, {later}: this autoencoder's clips start with a picture, "
                "which is a frame kept of the window before"
            )
        return [[size] * (config.rollout_frames // size)] + [[size] * (later // size)] * (config.windows - 1)

    def update(self, step: int) -> Metrics:
        config, metrics = self.config, {}
        if step % config.critic_ratio == 0:
            metrics = optimizer_step(
                self.model,
                self.optimizers["generator"],
                config.loop,
                config.generator,
                step,
                lambda micro_batch: self.generator_losses(step, micro_batch),
                name="generator",
            )
            self._average(step)
        metrics |= optimizer_step(
            self.fake,
            self.optimizers["critic"],
            config.loop,
            config.critic,
            step,
            lambda micro_batch: self.critic_losses(step, micro_batch),
            name="critic",
        )
        return metrics

    def _average(self, step: int) -> None:
        """Averages begin at `ema_start`; before it they follow the weights."""
        if step >= self.config.ema_start:
            self.ema.update(self.model)
        else:
            self.ema.reset(self.model)

    def generator_losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """One loss per window of a rollout with gradients."""
        config = self.config
        for clip, new, scores, sources, selection in self.clips(step, micro_batch, _GENERATOR):
            at, score = self._prepare_comparison(clip, sources), config.score
            with self._autocast():
                if config.loss == "sid":
                    loss = sid_loss(
                        at, scores["real"], scores["fake"], real_guidance=score.real_guidance, alpha=score.sid_alpha
                    )
                else:
                    loss = dmd_loss(
                        at,
                        scores["real"],
                        scores["fake"],
                        real_guidance=score.real_guidance,
                        fake_guidance=score.fake_guidance,
                        mask=new,
                    )
            yield (loss + config.selector_weight * selection) / len(self.windows)

    def critic_losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """One flow-matching loss per window of a rollout without gradients."""
        for clip, _, scores, sources, _ in self.clips(step, micro_batch, _CRITIC):
            at = self._prepare_comparison(clip, sources)
            with self._autocast():
                loss = critic_loss(at, scores["fake"])
            yield loss / len(self.windows)

    def _prepare_comparison(self, clip: Tensor, sources: list[torch.Generator]) -> Compared:
        """A clip with the noise, and one timestep per sample, at which the scores look at it."""
        score = self.config.score
        raw = torch.stack([torch.randint(0, 1000, (), generator=g) for g in sources])
        timestep = score_timestep(raw, shift=score.shift, low=score.low, high=score.high)
        return Compared(clip, noise_like(clip, sources), timestep.to(clip.device), self.schedule, self.score_schedule)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.loop)

    def clips(
        self, step: int, micro_batch: int, stream: int
    ) -> Iterator[tuple[Tensor, Tensor | None, dict[str, Score], list[torch.Generator], Tensor]]:
        """Roll out a micro-batch; per window: clip [B, F, C, H, W], mask of its new frames (None: all), scores of its
        prompts, random sources, selector loss."""
        config, train = self.config, stream == _GENERATOR
        draw = draw_number(config.loop, step, micro_batch)
        prompts = self.source.prompts(2 * draw + train, config.loop.micro_batch)
        with torch.no_grad():
            text, negative = (self.pipe.text.encode(p) for p in (prompts, [config.negative_prompt]))
        negative = negative.expand_as(text)
        sources = generators(config.loop.seed, draw, len(prompts), stream=stream)
        # One exit step for all chunks, samples and processes of an update.
        shared = generators(config.loop.seed, step, 1, stream=stream + 4)[0]
        exit_step = int(torch.randint(0, config.sampler.steps, (), generator=shared))
        latents = self._start(len(prompts))
        memory = make_model_memory(self.model, self.memory, latents, cache_gradient=config.cache_gradient)
        if train and config.selector_weight:
            layers = torch.randperm(len(self.model.blocks), generator=shared)[: config.selector_layers]
            memory.distil_selectors(frozenset(layers.tolist()))
        chunks = [frames for window in self.windows for frames in window]
        channels, rows, cols = latents.shape[2:]
        noise = SeededNoise(sources, (channels, rows, cols), self.device, torch.float32)
        training = TrainingRollout(
            exit_steps=[exit_step] * len(chunks),
            gradient_from_frame=0 if train else sum(chunks),
            context_noise=config.context_noise,
        )
        stream_of_chunks = rollout(self.model, text, chunks, memory, noise, config.sampler, training=training)
        past = latents[:, :0]
        for window in self.windows:
            with nullcontext() if train else torch.no_grad(), self._autocast():
                new = [next(stream_of_chunks).latents.float() for _ in window]
            kept = past[:, max(0, past.shape[1] + sum(window) - config.rollout_frames) :]
            clip = torch.cat([self._as_start(past, kept), *new], 1)
            mask = None
            if kept.shape[1]:
                mask = torch.ones_like(clip, dtype=torch.bool)
                mask[:, : kept.shape[1]] = False
            losses = memory.selector_losses
            context = make_context(clip, self.model.config.chunk_frames, config.score.causal_window)
            scores = {
                name: make_score(net, text, negative, context)
                for name, net in (("real", self.real), ("fake", self.fake))
            }
            yield clip, mask, scores, sources, torch.stack(losses).mean() if losses else clip.new_zeros(())
            losses.clear()
            past = clip.detach()

    def _as_start(self, past: Tensor, kept: Tensor) -> Tensor:
        """The frames that a window keeps of the clip `past` before it, [B, F, C, H, W], as the start of a clip: where
        the first latent frame of a clip is one picture (Wan's autoencoder), the first kept one becomes its last."""
        if not (self.pipe.autoencoder.first_frame_alone and kept.shape[1]):
            return kept
        until = past[:, : past.shape[1] - kept.shape[1] + 1]
        picture = self.pipe.autoencoder.decode(until.transpose(1, 2))[:, :, -1:]
        return torch.cat([self.pipe.autoencoder.encode(picture).transpose(1, 2).to(kept), kept[:, 1:]], 1)

    def _start(self, batch: int) -> Tensor:
        """An empty [B, 0, C, H, W] that carries the sizes of a rollout, those of the model's own videos."""
        height, width = self.pipe.geometry.latent_size(self.pipe.defaults.height, self.pipe.defaults.width)
        return torch.zeros(batch, 0, self.pipe.autoencoder.latent_channels, height, width, device=self.device)

    def validate(self, step: int, folder: Path) -> None:
        sampled = SparseForcingPipeline(
            **{**self.pipe.components, "transformer": self.model},
            defaults=replace(self.pipe.defaults, sampler=self.config.sampler, memory=self.memory),
        )
        # Sharded weights arrive in the type of the computation.
        with self._autocast(), swap_in_average(self.model, self.ema):
            write_samples(sampled, step, folder, memory=self.memory, seed=self.config.loop.seed)

    def export(self, folder: Path) -> None:
        export_pipeline(
            self.pipe,
            self.config.model,
            self.model,
            self.ema,
            folder,
            lora=self.config.lora,
            sampler=self.config.sampler,
            memory=self.memory,
        )


def train(config: DistillConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: DistillRecipe(config, accelerator), config.loop, config, out, resume)
