"""Recipe: train the embedded model's autoencoder on procedural clips (minutes on one core), or a better one from it.

sparse-forcing train autoencoder --config training/configs/tiny-autoencoder.yaml --output runs/tiny-autoencoder
sparse-forcing train autoencoder --config training/configs/tiny-decoder.yaml --output runs/tiny-decoder
sparse-forcing train autoencoder --config training/configs/tiny-details.yaml --output runs/tiny-details

A new decoder leaves the latents as they are, so that video models trained on them go on being right. More channels
leave the old ones (nearly) as they are, so that those models have only the new ones to learn.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.config import constructor_settings
from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.errors import ConfigError
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder
from sparse_forcing.scenes.sample import shape_table
from sparse_forcing.training.data.procedural import procedural_batch, step_seed
from sparse_forcing.training.engine.checkpoint import Stateful, save_checkpoint
from sparse_forcing.training.engine.guard import STOPPED, StopRequest
from sparse_forcing.training.engine.metrics import append_row, forget_beyond
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.recipes.embedded.growth import load_leading

FIT_SIZE = 64  # pixels to the side of the clips on which patches are fitted


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Everything the run depends on.

    Args:
        sizes: pixels to the side of the clips; steps take turns, and batches keep their number of pixels.
        batch_size: clips of `sizes[0]` in a step.
        noise: standard deviation of the noise added to (unit variance) latents, drawn up to this value for each clip.
        decoder_blocks: depth of the decoder, `num_blocks` when None.
        init_from: folder of a trained autoencoder (its `latent_channels`, `components`, `dim` and `num_blocks` hold):
            only a new decoder is trained for its latents, unless there are `extra_channels`.
        extra_channels: numbers per token to add to a trained autoencoder's, all of which then goes on learning.
        anchor: beside `extra_channels`: weight of the squared distance of the old channels from what they were.
        object_weight: how much more than the background objects and their surroundings count. With it errors are
            relative to the contrast of the clip's objects, so that a green star on gray has its points drawn as well as
            a yellow one on black.
        shape_weights: how much likelier than the rest a shape is.
        fit_clips: clips that the fixed linear transform is fitted on; without effect beside `init_from`, which has one.
    """

    steps: int = 3000
    seed: int = 0
    sizes: tuple[int, ...] = (64, 64, 64, 128)
    batch_size: int = 48
    two_object_fraction: float = 0.25
    latent_channels: int = 16
    components: int = 192
    dim: int = 160
    num_blocks: int = 2
    decoder_blocks: int | None = None
    init_from: str | None = None
    extra_channels: int = 0
    anchor: float = 0.1
    object_weight: float = 0.0
    shape_weights: dict[str, float] | None = None
    fit_clips: int = 1024
    noise: float = 0.3
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    checkpoint_minutes: float = 4.0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.steps, self.batch_size, self.fit_clips, *self.sizes) < 1:
            raise ConfigError("steps, batch_size, fit_clips and sizes must be positive")
        if self.decoder_blocks is not None and self.decoder_blocks < 1:
            raise ConfigError(f"decoder_blocks: must be at least 1, got {self.decoder_blocks}")
        if min(self.extra_channels, self.anchor, self.object_weight) < 0:
            raise ConfigError("extra_channels, anchor and object_weight must not be negative")
        if self.extra_channels and self.init_from is None:
            raise ConfigError("extra_channels: need an autoencoder to add them to (init_from)")
        if self.shape_weights is not None:
            shape_table(self.shape_weights)


def fit_patches(patches: PatchAutoencoder, seed: int, clips: int) -> list[float]:
    """Fit the fixed linear transform on clips of its own seed; standard deviations of its latents."""
    batch = procedural_batch(
        seed, 0, batch_size=clips, num_frames=2 * patches.temporal_stride, size=FIT_SIZE, two_object_fraction=0.25,
        caption_dropout=0.0,
    )  # fmt: skip
    return patches.fit(batch.pixels)


def start(config: AutoencoderConfig) -> tuple[TokenAutoencoder, TokenAutoencoder | None]:
    """What learns, and what its old channels must not leave: a fresh autoencoder, a trained one, frozen,
    with a fresh decoder, or a trained one with more channels."""
    if config.init_from is None:
        vae = TokenAutoencoder(
            config.latent_channels, components=config.components, dim=config.dim, num_blocks=config.num_blocks,
            decoder_blocks=config.decoder_blocks,
        )  # fmt: skip
        fit_patches(vae.patches, config.seed, config.fit_clips)
        return vae, None
    try:
        trained = TokenAutoencoder.from_pretrained(config.init_from, local_files_only=True).float()
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from: {config.init_from} cannot be read; train it first") from error
    trained.eval().requires_grad_(False)
    if config.extra_channels:
        blocks = trained.config.decoder_blocks or trained.config.num_blocks
        if config.decoder_blocks not in (None, blocks):
            raise ConfigError(f"decoder_blocks: that of {config.init_from} goes on, and has {blocks}")
        return with_channels(trained, config.extra_channels).train(), trained
    vae = TokenAutoencoder(**constructor_settings(trained.config) | {"decoder_blocks": config.decoder_blocks})
    for part in ("patches", "encoder", "normalize"):
        getattr(vae, part).load_state_dict(getattr(trained, part).state_dict())
    vae.eval().requires_grad_(False)
    vae.decoder.train().requires_grad_(True)
    return vae, None


def with_channels(trained: TokenAutoencoder, extra: int) -> TokenAutoencoder:
    """The same autoencoder with `extra` channels after its own, encoded at random and ignored by the decoder."""
    vae = TokenAutoencoder(
        **constructor_settings(trained.config) | {"latent_channels": trained.latent_channels + extra}
    )
    last = f"encoder.{len(vae.encoder) - 1}."
    load_leading(vae, trained.state_dict(), readers=("decoder.0.",), writers=(last, "normalize."))
    return vae


def object_weights(pixels: Tensor, weight: float) -> Tensor:
    """What each of the pixels [B, 3, F, H, W] counts for, [B, 1, F, H, W]: 1 / contrast, and 1 + `weight` times that
    where an object is near; contrast is the objects' mean squared distance from the background, the frame's median."""
    background = pixels.flatten(3).median(-1).values[..., None, None]
    distance = (pixels - background).square().sum(1)
    objects = distance > 0.01 * distance.amax((1, 2, 3), keepdim=True).clamp(min=1e-3)
    contrast = (distance * objects).sum((1, 2, 3)) / objects.sum((1, 2, 3)).clamp(min=1)
    reach = max(1, pixels.shape[-1] // 32)
    near = F.max_pool2d(objects.float(), 2 * reach + 1, 1, reach)
    return ((1 + weight * near) / contrast.clamp(min=0.1)[:, None, None, None])[:, None]


@dataclass(frozen=True)
class Losses:
    """total: what is learned from; error: mean squared pixel error; drift: squared distance from the anchor, or 0."""

    total: Tensor
    error: Tensor
    drift: Tensor


def reconstruction_losses(
    vae: TokenAutoencoder, pixels: Tensor, noise: float, generator: torch.Generator, *, object_weight: float = 0.0,
    anchor: TokenAutoencoder | None = None, anchor_weight: float = 0.0,
) -> Losses:  # fmt: skip
    """Losses after noise on the latents. Errors count by `object_weights` where that is not 0; the first channels are
    held near those of an `anchor`."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=multiplies_bfloat16(pixels.device)):
        latents = vae.encode(pixels)
        level = noise * torch.rand(len(pixels), 1, 1, 1, 1, generator=generator)
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        error = (vae.draw(noisy) - pixels).square()
        total = (error * object_weights(pixels, object_weight)).mean() if object_weight else error.mean()
        drift = torch.zeros(())
        if anchor is not None:
            held = anchor.encode(pixels)
            drift = (latents[:, : held.shape[1]] - held).square().mean()
        return Losses(total + anchor_weight * drift, error.mean().detach(), drift.detach())


def step_losses(config: AutoencoderConfig, vae: TokenAutoencoder, anchor: TokenAutoencoder | None, step: int) -> Losses:
    """Losses of one step's clips, a function of the config and the step alone."""
    size = config.sizes[step % len(config.sizes)]
    clips = procedural_batch(
        config.seed + 1, step, batch_size=max(1, config.batch_size * config.sizes[0] ** 2 // size**2),
        num_frames=vae.temporal_stride, size=size, two_object_fraction=config.two_object_fraction,
        caption_dropout=0.0, late_start_fraction=0.8, shape_weights=config.shape_weights,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(step_seed(config.seed, step, stream=1))
    return reconstruction_losses(
        vae, clips.pixels, config.noise, generator, object_weight=config.object_weight, anchor=anchor,
        anchor_weight=config.anchor,
    )  # fmt: skip


def train(config: AutoencoderConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume; checkpoints, `metrics.jsonl` and the finished `vae` folder go to `out`. Returns 0, or 143 after
    SIGTERM."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    vae, old = start(config)
    learned = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    parts: dict[str, Stateful] = {"vae": vae, "optimizer": optimizer}
    step, window = (resume or Resume()).load(out, parts, config), []
    forget_beyond(out / "metrics.jsonl", step)
    saved = began = time.monotonic()
    stopping = False
    with StopRequest() as stop:
        while step < config.steps and not stopping:
            losses = step_losses(config, vae, old, step)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / config.warmup_steps)
            optimizer.step()
            step += 1
            window.append([losses.total.item(), losses.error.item(), losses.drift.item()])
            stopping = stop.requested()
            if step % 50 == 0 or step == config.steps or stopping:
                means = dict(zip(("loss", "error", "drift"), torch.tensor(window).mean(0).tolist()))
                seconds = (time.monotonic() - began) / len(window)
                append_row(out / "metrics.jsonl", {"step": step, **means, "seconds": seconds})
                psnr = 10 * math.log10(4 / means["error"])
                print(f"step {step}/{config.steps} {psnr:.1f} dB with noise, {seconds:.2f} s/step", flush=True)
                window, began = [], time.monotonic()
            if step == config.steps or stopping or time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save_checkpoint(out, step, parts, asdict(config))
                saved = time.monotonic()
    if step < config.steps:
        return STOPPED
    vae.eval().save_pretrained(out / "vae")
    return 0
