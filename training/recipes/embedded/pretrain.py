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
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_forcing.devices import multiplies_bfloat16, resolve_device
from sparse_forcing.model.attention import ParallelAttention, teacher_forcing_mask
from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.training.data.procedural import ClipBatch, procedural_batch, step_seed
from sparse_forcing.training.engine.checkpoint import Stateful, save_checkpoint
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.guard import STOPPED, StopRequest
from sparse_forcing.training.engine.metrics import append_row, forget_beyond
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.losses.flow_matching import (
    flow_matching_error,
    noisy_latents,
    sample_sigma,
    unit_variance_weight,
)
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
    captioned,
    make_models,
)
from sparse_forcing.training.recipes.embedded.scene_targets import course_targets, pose_targets


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
        seed = step_seed(config.seed, step, stream=2)
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
class Losses:
    """flow: squared error of the flow, for people to read; balanced: the same by noise level, to learn from; pose,
    course and attribute: of the other heads."""

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
) -> Losses:
    """Losses of a batch of clips; teacher forcing when they span more than one chunk."""
    generator = torch.Generator().manual_seed(step_seed(config.seed, step, stream=1))
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
    told = captioned(clips.captions, one_object.device)
    error = flow_matching_error(flow, latents, noise, unit_variance_weight(sigma, model.transformer.config.latent_std))
    return Losses(
        flow=error.mean(),
        balanced=model.balance(error, sigma, kind=model.task(part)),
        pose=model.token_loss(model.pose_head, poses[:, -noisy_frames * rows * rows :], torch.ones_like(told)),
        course=model.token_loss(model.course_head, courses, one_object & told),
        attribute=model.attribute_loss(text.float(), clips.captions, clips.scenes),
    )


def train_step(
    model: TextToVideo, optimizers: list, ema: ParameterEma, vae: EmbeddedAutoencoder, config: PretrainConfig, step: int
) -> dict[str, float]:
    """One optimizer step; its losses by name. Raises FloatingPointError before touching the weights when one of them is
    not finite."""
    part = part_at(config, step)
    clips = procedural_batch(
        config.seed + 1, step, batch_size=part.batch_size, num_frames=part.latent_frames * vae.temporal_stride,
        size=part.sizes[0], two_object_fraction=config.two_object_fraction, caption_dropout=config.caption_dropout,
        late_start_fraction=0.8 if part.continuation else 0.0, motion_weights=part.motion_weights,
        shape_weights=part.shape_weights, device=model.transformer.device,
    )  # fmt: skip
    losses = training_loss(model, vae, clips, config, part, step)
    total = losses.balanced + config.pose_weight * losses.pose + config.course_weight * losses.course
    total = total + config.attribute_weight * losses.attribute
    total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not (torch.isfinite(total) and torch.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss {losses.flow.item()}, gradient norm {norm.item()}; weights left unchanged"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(*stage_at(config, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ema.update(model)
    name = "continuation_loss" if part.continuation else "loss"
    name += f"_{part.sizes[0]}" if part.sizes[0] != model.sizes[0] else ""
    others = {"pose_loss": losses.pose, "course_loss": losses.course, "attribute_loss": losses.attribute}
    return {name: losses.flow.item(), **{key: loss.item() for key, loss in others.items()}}


class Progress:
    """Mean losses of the last stretch, as a line of `metrics.jsonl` and one to read."""

    def __init__(self, out: Path, total: int) -> None:
        self.out, self.total = out, total
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(list)
        self.steps, self.began = 0, time.monotonic()

    def add(self, losses: dict[str, float]) -> None:
        self.steps += 1
        for name, value in losses.items():
            self.sums[name].append(value)

    def report(self, step: int) -> None:
        means = {name: sum(values) / len(values) for name, values in sorted(self.sums.items())}
        seconds = (time.monotonic() - self.began) / self.steps
        append_row(self.out / "metrics.jsonl", {"step": step, **means, "seconds_per_step": seconds})
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = seconds * (self.total - step) / 60
        print(f"step {step}/{self.total} {shown} {seconds:.2f} s/step, {left:.0f} min left", flush=True)
        self._reset()


def pretrain(config: PretrainConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the whole curriculum; checkpoints and `metrics.jsonl` go to `out`.

    Returns 0, or 143 after SIGTERM.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = resolve_device(config.device, "device:")
    vae, model = make_models(config)
    vae.to(device)
    model.to(device)
    optimizers, ema = make_optimizers(model, config), ParameterEma(model, config.ema_decay)
    parts: dict[str, Stateful] = {"model": model, "ema": ema, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    step = (resume or Resume()).load(out, parts, config)
    forget_beyond(out / "metrics.jsonl", step)
    if step == 0 and config.text_steps:
        print(f"captions: loss {pretrain_text(model, config):.4f} after {config.text_steps} steps", flush=True)
        ema.reset(model)
    if config.compile:
        for block in model.transformer.blocks:
            block.compile(dynamic=False)  # a stage has few sizes, and fixed ones are faster
    total = sum(stage.steps for stage in config.stages)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, step {step} of {total}", flush=True)
    saved, progress = time.monotonic(), Progress(out, total)
    stopping = False
    with StopRequest() as stop:
        while step < total and not stopping:
            progress.add(train_step(model, optimizers, ema, vae, config, step))
            step += 1
            stopping = stop.requested()
            if step % 50 == 0 or step == total or stopping:
                progress.report(step)
            if step == total or stopping or time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save_checkpoint(out, step, parts, asdict(config), keep=config.keep_checkpoints)
                saved = time.monotonic()
    return STOPPED if step < total else 0
