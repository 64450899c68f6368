"""Recipe: train the embedded model's autoencoder on procedural clips (minutes on one core), or a better one from it.

sparse-forcing train autoencoder --config training/configs/tiny-autoencoder.yaml --output runs/tiny-autoencoder
sparse-forcing train autoencoder --config training/configs/tiny-decoder.yaml --output runs/tiny-decoder
sparse-forcing train autoencoder --config training/configs/tiny-details.yaml --output runs/tiny-details

A new decoder leaves the latents as they are, so that video models trained on them go on being right. More channels
leave the old ones (nearly) as they are, so that those models have only the new ones to learn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from sparse_forcing.config import constructor_settings
from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.errors import ConfigError
from sparse_forcing.media.video import write_video
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder
from sparse_forcing.model_folder.folder import write_autoencoder
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.sample import shape_table
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES, FRAME_RATE
from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.training.data.procedural import check_world_share, procedural_batch, step_seed, worlds_in_batch
from sparse_forcing.training.engine.checkpoint import Stateful
from sparse_forcing.training.engine.loop import Recipe, run
from sparse_forcing.training.engine.optim import apply_gradients
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import RunConfig, check_bounds
from sparse_forcing.training.recipes.embedded.growth import load_leading
from sparse_forcing.training.recipes.embedded.tiny import TINY
from sparse_forcing.training.recipes.validation import sample_path, switch_to_eval

FIT_SIZE = 64  # pixels to the side of the clips on which patches are fitted
LARGEST_SIZE = 4096  # pixels
SAMPLES = 2  # clips of a validation
SIZES = {
    "latent_channels": (1, 1 << 12), "components": (1, 1 << 12), "dim": (1, 1 << 12), "num_blocks": (1, 64),
    "extra_channels": (0, 1 << 12), "batch_size": (1, 1 << 20), "fit_clips": (1, 1 << 20),
}  # fmt: skip
"""Least and greatest of what an autoencoder is made of and learns from at once; beyond is a slip of the hand."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoop(RunConfig):
    """The loop's settings of this stage. Args: steps: optimizer steps."""

    steps: int = 3000
    max_grad_norm: float | None = None
    log_every: int = 50
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("steps")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Everything the run depends on.

    Args:
        sizes: pixels to the side of the clips; steps take turns, and batches keep their number of pixels.
        batch_size: clips of `sizes[0]` in a step.
        noise: standard deviation of the noise added to (unit variance) latents, drawn up to this value for each clip.
        decoder_blocks: depth of the decoder, `num_blocks` when None.
        init_from: model, or folder `vae` of one, with a trained autoencoder (its `latent_channels`, `components`, `dim`
            and `num_blocks` hold): only a new decoder is trained for its latents, unless there are `extra_channels`.
        extra_channels: numbers per token to add to a trained autoencoder's, all of which then goes on learning.
        encoder_learns: beside `init_from`: all of a trained autoencoder goes on learning; `pipeline` then holds the
            whole model that `init_from` names.
        anchor: beside either: weight of the squared distance of the old channels from what they were, in old scenes.
        object_weight: how much more than the background objects and their surroundings count. With it errors are
            relative to the contrast of the clip's objects, so that a green star on gray has its points drawn as well as
            a yellow one on black.
        shape_weights: how much likelier than the rest a shape is.
        worlds, world_fraction: kinds of worlds by weight, and the share of clips that are cut from one.
        fit_clips: clips that the fixed linear transform is fitted on; without effect beside `init_from`, which has one.
    """

    RENAMED: ClassVar = {
        "steps": "loop.steps",
        "seed": "loop.seed",
        "checkpoint_minutes": "loop.checkpoint_every (in steps)",
    }

    loop: AutoencoderLoop = field(default_factory=AutoencoderLoop)
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
    encoder_learns: bool = False
    anchor: float = 0.1
    object_weight: float = 0.0
    shape_weights: dict[str, float] | None = None
    worlds: dict[str, float] | None = None
    world_fraction: float = 0.0
    fit_clips: int = 1024
    noise: float = 0.3
    learning_rate: float = 2e-3
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        if not self.sizes or min(self.warmup_steps, *self.sizes) < 1:
            raise ConfigError("warmup_steps and sizes must be positive")
        if max(self.sizes) > LARGEST_SIZE:
            raise ConfigError(f"sizes: at most {LARGEST_SIZE} pixels, got {max(self.sizes)}")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate: must be positive, got {self.learning_rate:g}")
        check_bounds(self, SIZES)
        if self.decoder_blocks is not None:
            check_bounds(self, {"decoder_blocks": (1, 64)})
        if min(self.anchor, self.object_weight, self.noise) < 0:
            raise ConfigError("anchor, object_weight and noise must not be negative")
        if self.extra_channels and self.init_from is None:
            raise ConfigError("extra_channels: need an autoencoder to add them to (init_from)")
        if self.encoder_learns and (self.init_from is None or self.extra_channels):
            raise ConfigError(
                "encoder_learns: needs init_from, and has no effect beside extra_channels, which imply it"
            )
        check_world_share(self.worlds, self.world_fraction)
        if self.shape_weights is not None:
            shape_table(self.shape_weights)


def fit_patches(patches: PatchAutoencoder, seed: int, clips: int) -> list[float]:
    """Fit the fixed linear transform on clips of its own seed; standard deviations of its latents."""
    batch = procedural_batch(
        seed,
        0,
        batch_size=clips,
        num_frames=2 * patches.temporal_stride,
        size=FIT_SIZE,
        two_object_fraction=0.25,
        caption_dropout=0.0,
    )
    return patches.fit(batch.pixels)


def load_trained_autoencoder(name: str, setting: str) -> TokenAutoencoder:
    """The frozen autoencoder of a model, by the model's folder or by its folder `vae`.

    Raises:
        ConfigError: it cannot be read; `setting` is what named it.
    """
    folder = Path(name)
    inner = folder / "vae"
    try:
        vae = TokenAutoencoder.from_pretrained(inner if inner.is_dir() else folder, local_files_only=True).float()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {name} cannot be read; train it first (stage autoencoder)") from error
    return vae.eval().requires_grad_(False)


def check_sizes(sizes: Iterable[int], vae: PatchAutoencoder | TokenAutoencoder, setting: str) -> None:
    """Raise ConfigError for clips that an autoencoder cannot cut into whole tokens."""
    for size in sizes:
        if size % vae.spatial_stride:
            raise ConfigError(f"{setting}: {size} pixels are not a multiple of {vae.spatial_stride}")


def start(config: AutoencoderConfig) -> tuple[TokenAutoencoder, TokenAutoencoder | None]:
    """What learns, and what its old channels must not leave: a fresh autoencoder, a trained one, frozen,
    with a fresh decoder, or a trained one with more channels."""
    if config.init_from is None:
        vae = TokenAutoencoder(
            config.latent_channels,
            components=config.components,
            dim=config.dim,
            num_blocks=config.num_blocks,
            decoder_blocks=config.decoder_blocks,
        )
        fit_patches(vae.patches, config.loop.seed, config.fit_clips)
        return vae, None
    trained = load_trained_autoencoder(config.init_from, "init_from")
    if config.extra_channels or config.encoder_learns:
        blocks = trained.config.decoder_blocks or trained.config.num_blocks
        if config.decoder_blocks not in (None, blocks):
            raise ConfigError(f"decoder_blocks: the decoder of {config.init_from} has {blocks}; leave the setting out")
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
class Reconstruction:
    """Losses of clips drawn again.

    total: loss that is learned from; error: mean squared pixel error; drift: squared distance from the anchor, or 0.
    """

    total: Tensor
    error: Tensor
    drift: Tensor


def reconstruction_losses(
    vae: TokenAutoencoder,
    pixels: Tensor,
    noise: float,
    generator: torch.Generator,
    *,
    object_weight: float = 0.0,
    anchor: TokenAutoencoder | None = None,
    anchor_weight: float = 0.0,
    anchored: Tensor | None = None,
) -> Reconstruction:
    """Losses after noise on the latents. Errors count by `object_weights` where that is not 0; the first channels are
    held near those of an `anchor`, in the clips that are `anchored` ([B] bool, None: all)."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=multiplies_bfloat16(pixels.device)):
        latents = vae.encode(pixels)
        level = noise * torch.rand(len(pixels), 1, 1, 1, 1, generator=generator)
        added = level * torch.randn(latents.shape, generator=generator)  # drawn where the generator is
        noisy = latents + added.to(latents.device)
        error = (vae.draw(noisy) - pixels).square()
        total = (error * object_weights(pixels, object_weight)).mean() if object_weight else error.mean()
        drift = torch.zeros((), device=latents.device)
        if anchor is not None:
            held = anchor.encode(pixels)
            apart = (latents[:, : held.shape[1]] - held).square().flatten(1).mean(1)
            drift = apart.mean() if anchored is None else (apart * anchored).mean()
        return Reconstruction(total + anchor_weight * drift, error.mean().detach(), drift.detach())


def step_losses(
    config: AutoencoderConfig, vae: TokenAutoencoder, anchor: TokenAutoencoder | None, step: int
) -> Reconstruction:
    """Losses of one step's clips, a function of the config and the step alone."""
    size, seed = config.sizes[step % len(config.sizes)], config.loop.seed
    clips = procedural_batch(
        seed + 1,
        step,
        batch_size=max(1, config.batch_size * config.sizes[0] ** 2 // size**2),
        num_frames=vae.temporal_stride,
        size=size,
        two_object_fraction=config.two_object_fraction,
        caption_dropout=0.0,
        late_start_fraction=0.8,
        shape_weights=config.shape_weights,
        device=vae.device,
    )
    pixels, places = clips.pixels, put_worlds(config, clips.pixels, step)
    anchored = torch.ones(len(pixels), dtype=torch.bool).index_fill(0, torch.tensor(places, dtype=torch.long), False)
    generator = torch.Generator().manual_seed(step_seed(seed, step, stream=1))
    return reconstruction_losses(
        vae,
        pixels,
        config.noise,
        generator,
        object_weight=config.object_weight,
        anchor=anchor,
        anchor_weight=config.anchor,
        anchored=anchored.to(pixels.device),
    )


def put_worlds(config: AutoencoderConfig, pixels: Tensor, step: int) -> list[int]:
    """Replace a share of clips [B, 3, F, S, S] by pieces of worlds, from any moment on; returns which."""
    frames, size, settings = pixels.shape[2], pixels.shape[3], WorldConfig()
    places, worlds, _ = worlds_in_batch(
        config.loop.seed + 1,
        step,
        batch_size=len(pixels),
        fraction=config.world_fraction,
        weights=config.worlds or {},
        config=settings,
        caption_dropout=0.0,
    )
    if worlds is not None:
        seed = step_seed(config.loop.seed, step, stream=2)
        begin = random.Random(seed).randrange(settings.frames - frames + 1)
        drawn = worlds.render(size, frames=range(begin, begin + frames), device=pixels.device)
        pixels[places] = drawn.transpose(1, 2)
    return places


class AutoencoderRecipe(Recipe):
    """State and steps of one run."""

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        self.config, self.steps = config, config.loop.steps
        self.vae, self.anchor = start(config)
        check_sizes(config.sizes, self.vae, "sizes")
        self.vae.to(accelerator.device)
        if self.anchor is not None:
            self.anchor.to(accelerator.device)
        learned = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts: dict[str, Stateful] = {"vae": self.vae, "optimizer": self.optimizer}
        self.geometry = f"batch_size {config.batch_size}, {max(config.sizes)} pixels"

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, and half a cosine down to 0."""
        rate = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate * min(1.0, (step + 1) / self.config.warmup_steps)

    def update(self, step: int) -> dict[str, float]:
        losses = step_losses(self.config, self.vae, self.anchor, step)
        losses.total.backward()
        total, error, drift = losses.total.item(), losses.error.item(), losses.drift.item()
        apply_gradients(
            self.vae,
            [self.optimizer],
            step,
            name="reconstruction",
            loss=total,
            rate=self.rate(step),
            max_grad_norm=self.config.loop.max_grad_norm,
        )
        return {
            "loss": total,
            "error": error,
            "drift": drift,
            "psnr_with_noise": 10 * math.log10(4 / max(error, 1e-12)),
        }

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> None:
        """Write clips beside what is left of them."""
        pixels = procedural_batch(
            self.config.loop.seed,
            0,
            batch_size=SAMPLES,
            num_frames=CLIP_FRAMES,
            size=self.config.sizes[0],
            two_object_fraction=self.config.two_object_fraction,
            caption_dropout=0.0,
            device=self.vae.device,
        ).pixels
        with switch_to_eval(self.vae):
            drawn = self.vae.decode(self.vae.encode(pixels))
        folder.mkdir(parents=True, exist_ok=True)
        pairs = torch.cat([pixels, drawn], -1).clamp(-1, 1).add(1).div(2)
        for number, frames in enumerate(rearrange(pairs, "b c f h w -> b f h w c").float().cpu().numpy()):
            write_video(sample_path(folder, step, number), frames, fps=FRAME_RATE)

    def export(self, folder: Path) -> None:
        """The autoencoder alone; the whole model whose autoencoder has gone on learning."""
        if self.config.encoder_learns and (Path(str(self.config.init_from)) / "transformer").is_dir():
            pipe = SparseForcingPipeline.from_pretrained(str(self.config.init_from))
            pipe.vae = self.vae.eval()
            pipe.save_pretrained(folder)
        else:
            write_autoencoder(folder, self.vae.eval(), TINY)


def train(config: AutoencoderConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: AutoencoderRecipe(config, accelerator), config.loop, config, out, resume)
