"""Settings of self-forcing distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.losses.distribution_matching import ScoreConfig

LOSSES = ("dmd", "sid")


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
        cache_gradient: "detached" (past keys and values are constants), "straight_through" (they carry the gradient of
            the pass that made the chunk, as in Self-Forcing's released weights) or "clean" (of the pass that wrote
            them: what a chunk leaves behind learns from all later ones, over all windows; see replay.py).
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
        if self.cache_gradient not in ("detached", "straight_through", "clean"):
            raise ConfigError(f"cache_gradient: detached, straight_through or clean, got {self.cache_gradient!r}")
        if self.windows > 1 and self.cache_gradient == "straight_through":
            raise ConfigError("cache_gradient: detached or clean in long tuning, which frees each window's graph")
        if self.loss == "sid" and (self.score.fake_guidance or self.windows > 1):
            raise ConfigError("loss: sid needs fake_guidance 0 and windows 1")
        if self.window_frames is not None and not 0 < self.window_frames <= self.rollout_frames:
            raise ConfigError(f"window_frames: must be in 1..rollout_frames, got {self.window_frames}")
