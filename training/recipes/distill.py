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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import make_model_memory
from sparse_forcing.model.flow import FlowSchedule, few_step_timesteps
from sparse_forcing.model_folder.folder import find_model, load_transformer
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import RolloutTrace, TrainingRollout, rollout
from sparse_forcing.training.data.identity import DataIdentity
from sparse_forcing.training.engine.checkpoint import Stateful
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.loop import Recipe, run
from sparse_forcing.training.engine.optim import make_optimizer
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.losses.distribution_matching import (
    Compared,
    Score,
    critic_loss,
    dmd_loss,
    make_context,
    make_score,
    score_timestep,
    sid_loss,
)
from sparse_forcing.training.recipes.distill_config import DistillConfig
from sparse_forcing.training.recipes.replay import replay
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

_GENERATOR, _CRITIC = 3, 4
"""Random streams of the two updates of a step."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a rollout is made of. text, negative: [B, T, text_dim]; exit_step: whose x0 is each chunk; distilled: layers
    whose selector learns; train: it is the generator's."""

    text: Tensor
    negative: Tensor
    exit_step: int
    sources: list[torch.Generator]
    distilled: frozenset[int]
    train: bool


class Window(NamedTuple):
    """A window of a rollout: clip [B, F, C, H, W], mask of its new frames (None: all), scores of its prompts, loss of
    the selectors."""

    clip: Tensor
    new: Tensor | None
    scores: dict[str, Score]
    selection: Tensor


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
        """One loss per window of a rollout with gradients; one of the whole rollout where it is taken again."""
        config, draw = self.config, self.draw(step, micro_batch, _GENERATOR)
        if config.cache_gradient == "clean":
            yield self._replayed_loss(draw)
            return
        for window in self.clips(draw):
            loss = self._window_loss(window, window.clip, draw.sources)
            yield (loss + config.selector_weight * window.selection) / len(self.windows)

    def _window_loss(self, window: Window, clip: Tensor, sources: list[torch.Generator]) -> Tensor:
        """The generator's loss of `clip`, which is the window's."""
        at, scores, score = self._prepare_comparison(clip, sources), window.scores, self.config.score
        with autocast(self.device, self.config.loop):
            if self.config.loss == "sid":
                return sid_loss(
                    at, scores["real"], scores["fake"], real_guidance=score.real_guidance, alpha=score.sid_alpha
                )
            return dmd_loss(
                at,
                scores["real"],
                scores["fake"],
                real_guidance=score.real_guidance,
                fake_guidance=score.fake_guidance,
                mask=window.new,
            )

    def _replayed_loss(self, draw: Draw) -> Tensor:
        """The windows' losses in their clips, then once more what made the clips, with gradients (replay.py)."""
        config, trace = self.config, RolloutTrace()
        losses, gradients = [], []
        for chunks, window in zip(self.windows, self.clips(draw, trace)):
            clip = window.clip.detach().requires_grad_()
            loss = self._window_loss(window, clip, draw.sources) / len(self.windows)
            gradients.append(torch.autograd.grad(loss, clip)[0][:, -sum(chunks) :])
            losses.append(loss.detach())
        timestep = few_step_timesteps(config.sampler)[draw.exit_step].to(self.device)
        with autocast(self.device, self.config.loop):
            passed_on, selection = replay(
                self.model,
                self.memory,
                trace,
                draw.text,
                torch.cat(gradients, 1),
                timestep,
                self.schedule.sigma_at(timestep),
                draw.distilled,
            )
        return torch.stack(losses).sum() + passed_on + config.selector_weight * selection

    def critic_losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """One flow-matching loss per window of a rollout without gradients."""
        draw = self.draw(step, micro_batch, _CRITIC)
        for window in self.clips(draw):
            at = self._prepare_comparison(window.clip, draw.sources)
            with autocast(self.device, self.config.loop):
                loss = critic_loss(at, window.scores["fake"])
            yield loss / len(self.windows)

    def _prepare_comparison(self, clip: Tensor, sources: list[torch.Generator]) -> Compared:
        """A clip with the noise, and one timestep per sample, at which the scores look at it."""
        score = self.config.score
        raw = torch.stack([torch.randint(0, 1000, (), generator=g) for g in sources])
        timestep = score_timestep(raw, shift=score.shift, low=score.low, high=score.high)
        return Compared(clip, noise_like(clip, sources), timestep.to(clip.device), self.schedule, self.score_schedule)

    def draw(self, step: int, micro_batch: int, stream: int) -> Draw:
        """What the rollout of a micro-batch is made of."""
        config, train = self.config, stream == _GENERATOR
        number = draw_number(config.loop, step, micro_batch)
        prompts = self.source.prompts(2 * number + train, config.loop.micro_batch)
        with torch.no_grad():
            text, negative = (self.pipe.text.encode(p) for p in (prompts, [config.negative_prompt]))
        # One exit step for all chunks, samples and processes of an update.
        shared = generators(config.loop.seed, step, 1, stream=stream + 4)[0]
        exit_step = int(torch.randint(0, config.sampler.steps, (), generator=shared))
        layers = torch.randperm(len(self.model.blocks), generator=shared)[: config.selector_layers]
        return Draw(
            text=text,
            negative=negative.expand_as(text),
            exit_step=exit_step,
            train=train,
            sources=generators(config.loop.seed, number, len(prompts), stream=stream),
            distilled=frozenset(layers.tolist()) if train and config.selector_weight else frozenset(),
        )

    def clips(self, draw: Draw, trace: RolloutTrace | None = None) -> Iterator[Window]:
        """Roll out a micro-batch, window by window, with gradients unless it is the critic's or traced."""
        config, learns = self.config, draw.train and trace is None
        latents = self._start(len(draw.text))
        gradient = "detached" if config.cache_gradient == "clean" else config.cache_gradient
        memory = make_model_memory(self.model, self.memory, latents, cache_gradient=gradient)
        if draw.distilled:
            memory.distil_selectors(draw.distilled)
        chunks = [frames for window in self.windows for frames in window]
        channels, rows, cols = latents.shape[2:]
        noise = SeededNoise(draw.sources, (channels, rows, cols), self.device, torch.float32)
        training = TrainingRollout(
            exit_steps=[draw.exit_step] * len(chunks),
            gradient_from_frame=0 if learns else sum(chunks),
            context_noise=config.context_noise,
            trace=trace,
        )
        stream_of_chunks = rollout(self.model, draw.text, chunks, memory, noise, config.sampler, training=training)
        past = latents[:, :0]
        for window in self.windows:
            with nullcontext() if learns else torch.no_grad(), autocast(self.device, self.config.loop):
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
                name: make_score(net, draw.text, draw.negative, context)
                for name, net in (("real", self.real), ("fake", self.fake))
            }
            yield Window(clip, mask, scores, torch.stack(losses).mean() if losses else clip.new_zeros(()))
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
        with autocast(self.device, self.config.loop), swap_in_average(self.model, self.ema):
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
