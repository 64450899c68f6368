"""What pretraining learns, and when: its settings, the stages of its curriculum, what each step of them draws."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.sample import motion_table, shape_table
from sparse_forcing.training.data.procedural import step_seed
from sparse_forcing.training.engine.settings import RunConfig, check_bounds

LARGEST_SIZE = 4096
"""Pixels to the side of a clip."""
LARGEST_WIDTH = 4096
"""Numbers of a token inside the transformer."""
SIZES = {
    "num_attention_heads": (1, 256), "attention_head_dim": (6, 1024), "num_layers": (1, 256), "ffn_dim": (1, 1 << 16),
    "text_dim": (1, 1 << 14), "text_len": (1, 1 << 12), "text_neighbours": (0, 255), "latent_channels": (1, 1 << 12),
    "chunk_frames": (1, 1 << 10), "horizon_frames": (1, 1 << 12), "position_harmonics": (0, 64),
    "text_steps": (0, 1 << 31),
}  # fmt: skip
"""Least and greatest of what a model is made of; beyond is a slip of the hand, and would fill the memory first."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the curriculum: `steps` optimizer steps on clips of `latent_frames`.

    `continuation` is the share of steps that go on from a clean chunk: they start most clips in the middle of their
    scene and learn every chunk but the first. The other steps then learn first chunks, as many frames in all.
    `sizes` are pixels to the side of the clips; each step draws one, and batches keep their number of pixels.
    `shift` is that of the stage's noise levels, the model's where None: above it a stage dwells on high noise, where
    position and direction are decided. `motion_weights` and `shape_weights` say how much likelier than the rest a
    motion (in scenes of one object) or a shape is.
    """

    latent_frames: int
    batch_size: int
    steps: int
    continuation: float = 0.0
    learning_rate: float = 2e-3
    final_learning_rate: float | None = None
    warmup_steps: int = 100
    sizes: tuple[int, ...] = (64,)
    shift: float | None = None
    motion_weights: dict[str, float] | None = None
    shape_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        numbers = (self.latent_frames, self.batch_size, self.steps, self.warmup_steps)
        if not self.sizes or min(*numbers, *self.sizes) < 1:
            raise ConfigError(
                f"stages: latent_frames, batch_size, steps, sizes and warmup_steps must be positive, got {self}"
            )
        check_bounds(self, {"latent_frames": (1, 1 << 12), "batch_size": (1, 1 << 20)})
        if max(self.sizes) > LARGEST_SIZE:
            raise ConfigError(f"stages: sizes are at most {LARGEST_SIZE} pixels, got {max(self.sizes)}")
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"stages: shift must be positive, got {self.shift}")
        if self.motion_weights is not None:
            motion_table(self.motion_weights)
        if self.shape_weights is not None:
            shape_table(self.shape_weights)
        if not 0 <= self.continuation <= 1:
            raise ConfigError(f"stages: continuation must lie in [0, 1], got {self.continuation}")


@dataclass(frozen=True, kw_only=True)
class PretrainLoop(RunConfig):
    """The loop's settings of this stage, which is as long as the stages of its curriculum together."""

    max_grad_norm: float | None = 1.0
    log_every: int = 50
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything the run depends on; two runs with equal configs and seeds produce equal weights.

    `autoencoder` names a model, or the folder `vae` of one, whose autoencoder is taken; None beside no `init_from` fits
    principal components of patches of `fit_clips` clips.
    `init_from` names a model folder (or an embedded model) to go on from, instead of random weights. Beside it an
    `autoencoder` may add channels to the latents of that model, which begin at zero effect, and `text_neighbours`
    convolutions over so many words to its text encoder, which tells two objects apart with them: all of it is then
    taught again first, `text_steps` on captions alone.
    Steps see the same scenes and words on every device.
    """

    RENAMED: ClassVar = {
        "seed": "loop.seed",
        "device": "loop.device",
        "max_grad_norm": "loop.max_grad_norm",
        "keep_checkpoints": "loop.keep_checkpoints",
        "checkpoint_minutes": "loop.checkpoint_every (in steps)",
    }

    loop: PretrainLoop = field(default_factory=PretrainLoop)
    num_attention_heads: int = 6
    attention_head_dim: int = 32
    num_layers: int = 8
    ffn_dim: int = 768
    text_dim: int = 128
    text_len: int = 32
    text_neighbours: int = 0
    latent_channels: int = 96
    chunk_frames: int = 2
    horizon_frames: int = 10
    position_harmonics: int = 4
    optimizer: str = "muon"
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    shift: float = 4.0
    sigma_spread: float = 1.3
    text_steps: int = 400
    pose_layer: int = 4
    pose_weight: float = 0.5
    course_layer: int = 2
    course_weight: float = 1.0
    attribute_weight: float = 1.0
    context_noise: float = 0.15
    caption_dropout: float = 0.1
    two_object_fraction: float = 0.25
    compile: bool = False
    autoencoder: str | None = None
    fit_clips: int = 1024
    init_from: str | None = None
    stages: tuple[StageConfig, ...] = field(
        default_factory=lambda: (StageConfig(latent_frames=1, batch_size=96, steps=6000),)
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"optimizer: expected muon or adamw, got {self.optimizer!r}")
        if self.text_neighbours and (self.text_neighbours < 3 or self.text_neighbours % 2 == 0):
            raise ConfigError(f"text_neighbours: must be 0 or an odd number from 3 on, got {self.text_neighbours}")
        check_bounds(self, SIZES)
        if self.num_attention_heads * self.attention_head_dim > LARGEST_WIDTH:
            raise ConfigError(
                f"attention_head_dim {self.attention_head_dim} x num_attention_heads {self.num_attention_heads}: "
                f"at most {LARGEST_WIDTH}"
            )
        if self.fit_clips < 1:
            raise ConfigError(f"fit_clips: must be positive, got {self.fit_clips}")
        if not self.stages:
            raise ConfigError("stages: at least one stage is needed")
        for number, stage in enumerate(self.stages):
            if stage.latent_frames > self.chunk_frames and stage.latent_frames % self.chunk_frames:
                raise ConfigError(
                    f"stages.{number}.latent_frames: {stage.latent_frames} is not a multiple of chunk_frames "
                    f"{self.chunk_frames}"
                )
            if stage.continuation and stage.latent_frames <= self.chunk_frames:
                raise ConfigError(f"stages.{number}: a continuation needs more than one chunk of {self.chunk_frames}")
        for name, layer in (("pose_layer", self.pose_layer), ("course_layer", self.course_layer)):
            if not 0 <= layer < self.num_layers:
                raise ConfigError(f"{name}: must be a layer from 0 to {self.num_layers - 1}, got {layer}")


def stage_at(config: PretrainConfig, step: int) -> tuple[StageConfig, int]:
    """The stage of a global step and the step's number inside it."""
    for stage in config.stages:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise IndexError("step beyond the last stage")


def part_at(config: PretrainConfig, step: int) -> StageConfig:
    """What a global step learns: one size of its stage; where that has continuations, first chunks or those after."""
    stage, _ = stage_at(config, step)
    size = random.Random(step_seed(config.loop.seed, step, stream=4)).choice(stage.sizes)
    pixels = (size / stage.sizes[0]) ** 2
    stage = replace(stage, sizes=(size,), batch_size=max(1, round(stage.batch_size / pixels)))
    if stage.continuation == 0:
        return stage
    if random.Random(step_seed(config.loop.seed, step, stream=3)).random() < stage.continuation:
        return replace(stage, continuation=1.0)
    chunks = stage.latent_frames // config.chunk_frames
    return replace(stage, latent_frames=config.chunk_frames, batch_size=stage.batch_size * chunks, continuation=0.0)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Warm-up, then constant, or linear towards `final_learning_rate`."""
    final = stage.learning_rate if stage.final_learning_rate is None else stage.final_learning_rate
    decayed = stage.learning_rate + (final - stage.learning_rate) * step / stage.steps
    return decayed * min(1.0, (step + 1) / stage.warmup_steps)
