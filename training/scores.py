"""The score networks of a distillation: how they are compared, and transformers as scores, bidirectional or causal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.training.losses.distribution_matching import Score


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How scores are compared.

    Args:
        real_guidance, fake_guidance: added on top of the conditional prediction; classifier-free weight minus one.
        shift: of the levels at which scores are compared; schedule_shift: of the score networks' own table, when it
            differs (Self-Forcing's released weights: 8), None for the generator's.
        low, high: timesteps are clamped to this range.
        sid_alpha: of the SiD loss.
        causal_window: None for a bidirectional teacher: all frames of a clip, equally noisy, see each other. A number
            for a causal one, such as the student's own start: every noisy chunk sees itself and the finished chunks
            before it, that many latent frames in all.
    """

    real_guidance: float = 3.0
    fake_guidance: float = 0.0
    shift: float = 5.0
    schedule_shift: float | None = None
    low: float = 20.0
    high: float = 980.0
    sid_alpha: float = 1.0
    causal_window: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 1000:
            raise ConfigError(f"low and high: need 0 < low < high <= 1000, got {self.low} and {self.high}")
        if self.causal_window is not None and self.causal_window < 1:
            raise ConfigError(f"causal_window: must be at least 1 latent frame, got {self.causal_window}")


@dataclass(frozen=True)
class Context:
    """Finished chunks [B, F, C, H, W] that the noisy chunks of the same clip see, and what sees what."""

    clip: Tensor
    policy: ParallelAttention


def context_of(clip: Tensor, chunk_frames: int, window: int | None) -> Context | None:
    """What a causal teacher sees beside the noisy clip, within `window` latent frames; None: a bidirectional one."""
    if window is None:
        return None
    chunks = [chunk_frames] * (clip.shape[1] // chunk_frames)
    return Context(clip.detach(), ParallelAttention.teacher_forcing(chunks, window=window))


def score_of(
    network: CausalWanTransformer3DModel, text: Tensor, negative: Tensor, context: Context | None = None
) -> Score:
    """A transformer as a score of one micro-batch's prompts; without a context all frames see each other."""

    def score(x_t: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        prompt, inputs = text if conditional else negative, {}
        if context is not None:
            timestep = timestep[:, None].expand(-1, x_t.shape[1])
            inputs = {"policy": context.policy, "clean_hidden_states": context.clip.transpose(1, 2)}
        return network(x_t.transpose(1, 2), timestep, prompt, **inputs).transpose(1, 2)

    return score
