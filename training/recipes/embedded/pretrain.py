"""Recipe: pretrain a small causal text-to-video model from nothing, on a CPU or a GPU, on procedural clips.

Short clips first: one latent frame teaches colours and shapes several times faster per minute than long clips do, so
most of the budget goes there; later stages lengthen the clip. Clips of more than one chunk are trained by teacher
forcing: the sequence [context | noisy], where the context is clean or slightly noisy, so that rollouts tolerate their
own errors. Before all that and during it the text encoder learns which attributes captions name: still pictures
alone would make it forget the direction of motions. Inner layers also predict where objects are and where the caption
sends them (training/recipes/embedded/scene_targets.py). These heads are dropped in the end.

    sparse-forcing train pretrain --config CONFIG.yaml --output runs/tiny
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.model.attention import ParallelAttention, teacher_forcing_mask
from sparse_forcing.model_folder.folder import identify_autoencoder
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.training.data.procedural import ClipBatch, procedural_batch, step_seed
from sparse_forcing.training.engine.checkpoint import Stateful
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.loop import Recipe, run
from sparse_forcing.training.engine.optim import apply_gradients
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.losses.flow_matching import (
    flow_matching_error,
    noisy_latents,
    sample_sigma,
    unit_variance_weight,
)
from sparse_forcing.training.recipes.embedded.autoencoder import check_sizes
from sparse_forcing.training.recipes.embedded.curriculum import (
    PretrainConfig,
    StageConfig,
    learning_rate,
    part_at,
    stage_at,
)
from sparse_forcing.training.recipes.embedded.muon import BatchedMuon
from sparse_forcing.training.recipes.embedded.pretrain_model import (
    EmbeddedAutoencoder,
    TextToVideo,
    find_captioned,
    make_models,
)
from sparse_forcing.training.recipes.embedded.scene_targets import course_targets, pose_targets
from sparse_forcing.training.recipes.embedded.tiny import TINY
from sparse_forcing.training.recipes.validation import swap_in_average, switch_to_eval, write_samples


def make_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    inner = {
        name: p
        for name, p in model.named_parameters()
        if config.optimizer == "muon" and ".blocks." in name and p.ndim == 2
    }
    rest = [p for name, p in model.named_parameters() if name not in inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    ]
    if inner:
        optimizers.append(BatchedMuon(list(inner.values()), lr=1.0, weight_decay=config.weight_decay))
    return optimizers


def pretrain_text(model: TextToVideo, config: PretrainConfig) -> float:
    """Teach the text encoder what captions say, or of a trained one just the new head; returns the last loss.

    A trained one whose convolutions are new, and hence zero, is taught again as a whole.
    """
    parameters = [*model.attribute_head.parameters()]
    untaught = any(not convolution.weight.any() for convolution in model.text_encoder.convolutions)
    if config.init_from is None or untaught:
        parameters += model.text_encoder.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    loss = torch.zeros(())
    for step in range(config.text_steps):
        seed = step_seed(config.loop.seed, step, stream=2)
        scenes = sample_scenes(
            128, torch.Generator().manual_seed(seed), two_object_fraction=config.two_object_fraction, split="train"
        )
        words = random.Random(seed)
        captions = [caption(scene, words) for scene in scenes.scenes()]
        text = model.text_encoder.encode(captions)
        loss = model.attribute_loss(text, captions, scenes.to(text.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.item()


def forcing_inputs(latents: Tensor, config: PretrainConfig, stage: StageConfig, generator: torch.Generator) -> dict:
    """Context and visibility of a clip [B, C, F, H, W] of several chunks: every chunk sees the clean chunks before it.

    The last chunk is nobody's context; in a continuation the first one is nothing but context.
    """
    batch, _, frames = latents.shape[:3]
    chunk = config.chunk_frames
    level = torch.rand(batch, frames // chunk, generator=generator) ** 2 * config.context_noise
    level = level * (torch.rand(batch, 1, generator=generator) < 0.5)
    level = level.repeat_interleave(chunk, 1)[:, :-chunk].to(latents.device)
    context = latents[:, :, :-chunk]
    noise = torch.randn(context.shape, generator=generator).to(latents.device)
    skipped = chunk if stage.continuation else 0
    kept = torch.cat([torch.arange(frames - chunk), torch.arange(frames + skipped, 2 * frames)])
    mask = teacher_forcing_mask([chunk] * (frames // chunk))[kept][:, kept]
    return {
        "policy": ParallelAttention(len(kept), mask, torch.arange(frames).repeat(2)[kept]),
        "clean_hidden_states": noisy_latents(context, noise, level),
        "clean_timestep": 1000 * level,
    }


@dataclass(frozen=True)
class PretrainLosses:
    """Losses of one step.

    flow: squared error of the flow, for people to read; balanced: that error by noise level, to learn from; pose,
    course and attribute: of the other heads.
    """

    flow: Tensor
    balanced: Tensor
    pose: Tensor
    course: Tensor
    attribute: Tensor


def training_loss(
    model: TextToVideo,
    vae: EmbeddedAutoencoder,
    clips: ClipBatch,
    config: PretrainConfig,
    part: StageConfig,
    step: int,
) -> PretrainLosses:
    """Losses of a batch of clips; teacher forcing when they span more than one chunk."""
    generator = torch.Generator().manual_seed(step_seed(config.loop.seed, step, stream=1))
    with torch.no_grad():
        latents = vae.encode(clips.pixels)
    batch, frames, rows = latents.shape[0], latents.shape[2], latents.shape[3]
    inputs: dict = {"policy": ParallelAttention(frames)}
    if frames > config.chunk_frames:
        inputs = forcing_inputs(latents, config, part, generator)
    poses = pose_targets(clips.scenes, clips.start, frames, vae.temporal_stride, rows)
    if part.continuation:
        latents = latents[:, :, config.chunk_frames :]
    length = min(frames, config.chunk_frames)
    noisy_frames = latents.shape[2]
    sigma = sample_sigma(
        batch, noisy_frames // length, shift=part.shift or config.shift, spread=config.sigma_spread, generator=generator
    ).repeat_interleave(length, 1)
    noise = torch.randn(latents.shape, generator=generator)
    sigma, noise = sigma.to(latents.device), noise.to(latents.device)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=multiplies_bfloat16(latents.device)):
        text = model.text_encoder.encode(clips.captions)
        flow = model.transformer(noisy_latents(latents, noise, sigma), 1000 * sigma, text, **inputs)
    courses = course_targets(clips.scenes, rows).repeat(1, noisy_frames, 1)
    one_object = ~clips.scenes.present[:, 1:].any(1)
    told = find_captioned(clips.captions, one_object.device)
    error = flow_matching_error(flow, latents, noise, unit_variance_weight(sigma, model.transformer.config.latent_std))
    return PretrainLosses(
        flow=error.mean(),
        balanced=model.balance(error, sigma, kind=model.task(part)),
        pose=model.token_loss(model.pose_head, poses[:, -noisy_frames * rows * rows :], torch.ones_like(told)),
        course=model.token_loss(model.course_head, courses, one_object & told),
        attribute=model.attribute_loss(text.float(), clips.captions, clips.scenes),
    )


def train_step(
    model: TextToVideo, optimizers: list, ema: ParameterEma, vae: EmbeddedAutoencoder, config: PretrainConfig, step: int
) -> dict[str, float]:
    """One optimizer step; its losses by name. Raises NotFiniteError before touching the weights when one of them is not
    finite."""
    part = part_at(config, step)
    clips = procedural_batch(
        config.loop.seed + 1,
        step,
        batch_size=part.batch_size,
        num_frames=part.latent_frames * vae.temporal_stride,
        size=part.sizes[0],
        two_object_fraction=config.two_object_fraction,
        caption_dropout=config.caption_dropout,
        late_start_fraction=0.8 if part.continuation else 0.0,
        motion_weights=part.motion_weights,
        shape_weights=part.shape_weights,
        device=model.transformer.device,
    )
    losses = training_loss(model, vae, clips, config, part, step)
    total = losses.balanced + config.pose_weight * losses.pose + config.course_weight * losses.course
    total = total + config.attribute_weight * losses.attribute
    total.backward()
    apply_gradients(
        model,
        optimizers,
        step,
        name="model",
        loss=total.item(),
        rate=learning_rate(*stage_at(config, step)),
        max_grad_norm=config.loop.max_grad_norm,
        ema=ema,
    )
    name = "continuation_loss" if part.continuation else "loss"
    name += f"_{part.sizes[0]}" if part.sizes[0] != model.sizes[0] else ""
    others = {"pose_loss": losses.pose, "course_loss": losses.course, "attribute_loss": losses.attribute}
    return {name: losses.flow.item(), **{key: loss.item() for key, loss in others.items()}}


class PretrainRecipe(Recipe):
    """State and steps of one run."""

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config, self.steps = config, config.steps
        self.vae, self.model = make_models(config)
        check_sizes((size for stage in config.stages for size in stage.sizes), self.vae, "stages: sizes")
        self.vae.to(accelerator.device)
        self.model.to(accelerator.device)
        self.optimizers = make_optimizers(self.model, config)
        self.ema = ParameterEma(self.model, config.ema_decay)
        numbered = {f"optimizer{number}": optimizer for number, optimizer in enumerate(self.optimizers)}
        self.parts: dict[str, Stateful] = {"model": self.model, "ema": self.ema, **numbered}
        clips = " then ".join(f"{stage.batch_size} x {stage.latent_frames}" for stage in config.stages)
        self.geometry = f"clips x latent frames: {clips}"

    def begin(self, step: int) -> None:
        """Teach the text encoder what captions say, in a run that has not begun."""
        if step == 0 and self.config.text_steps:
            loss = pretrain_text(self.model, self.config)
            print(f"captions: loss {loss:.4f} after {self.config.text_steps} steps", file=sys.stderr, flush=True)
            self.ema.reset(self.model)
        if self.config.compile:
            for block in self.model.transformer.blocks:
                block.compile(dynamic=False)  # a stage has few sizes, and fixed ones are faster

    def update(self, step: int) -> dict[str, float]:
        return train_step(self.model, self.optimizers, self.ema, self.vae, self.config, step)

    def pipeline(self) -> SparseForcingPipeline:
        """The present weights as a model."""
        defaults = replace(TINY, vae=identify_autoencoder(self.vae))
        return SparseForcingPipeline(self.model.transformer, self.model.text_encoder, self.vae, defaults)

    def validate(self, step: int, folder: Path) -> None:
        with (
            swap_in_average(self.model, self.ema),
            switch_to_eval(self.model),
            torch.compiler.set_stance("force_eager"),
        ):
            write_samples(self.pipeline(), step, folder, memory=TINY.memory, seed=self.config.loop.seed)

    def export(self, folder: Path) -> None:
        with swap_in_average(self.model, self.ema):
            self.pipeline().save_pretrained(folder)


def train(config: PretrainConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the whole curriculum; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: PretrainRecipe(config, accelerator), config.loop, config, out, resume)
