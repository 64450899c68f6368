"""Distribution matching: DMD and SiD generator losses, the critic's loss (Self-Forcing; DMD2, arXiv 2405.14867), and
transformers as their scores.

The losses are pure functions of generated latents where scores look at them (`Compared`) and of score networks

    score(x_t, timestep, conditional) -> flow        conditional = False: the negative prompt

Guidance convention: `guidance` is added on top of the conditional prediction, r = c + g (c - u). The usual
classifier-free weight of u + w (c - u) is w = 1 + g; 0 is no guidance and spares the second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.eager_gradient import with_gradient
from sparse_forcing.model.flow import NUM_TRAIN_TIMESTEPS, FlowSchedule, add_noise, flow_to_x0, shift_sigma
from sparse_forcing.model.transformer import CausalWanTransformer3DModel

Score = Callable[[Tensor, Tensor, bool], Tensor]


def score_timestep(raw: Tensor, *, shift: float = 5.0, low: float = 20.0, high: float = 980.0) -> Tensor:
    """Timesteps [B] of uniform draws `raw` [B] in [0, 1000): shifted towards noise, then clamped to [low, high]."""
    return (NUM_TRAIN_TIMESTEPS * shift_sigma(raw / NUM_TRAIN_TIMESTEPS, shift)).clamp(low, high)


@dataclass(frozen=True)
class Compared:
    """Generated latents, and where scores are compared.

    Args:
        latents: [B, F, C, H, W]; noise: noise of their shape; timestep: [B], one per sample.
        schedule: adds the noise.
        score_schedule: turns a score's flow into x0; `schedule` when None. Use one for both; Self-Forcing's released
            weights were trained with shift 5 and shift 8 (a mismatch of up to 19 % at t = 20).
    """

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    schedule: FlowSchedule
    score_schedule: FlowSchedule | None = None

    @property
    def sigma(self) -> Tensor:
        """[B] noise levels."""
        return self.schedule.sigma_at(self.timestep)

    @property
    def x_t(self) -> Tensor:
        """[B, F, C, H, W] latents moved to that noise level."""
        return add_noise(self.latents, self.noise, self.sigma)

    def predict_x0(self, score: Score, x_t: Tensor, guidance: float = 0.0) -> Tensor:
        """A score's clean prediction from x_t, guided: c + guidance (c - u)."""
        sigma = (self.score_schedule or self.schedule).sigma_at(self.timestep)
        cond = flow_to_x0(score(x_t, self.timestep, True), x_t, sigma)
        if guidance == 0:
            return cond
        return cond + guidance * (cond - flow_to_x0(score(x_t, self.timestep, False), x_t, sigma))


def distribution_gradient(latents: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake - real) / mean |latents - real|, the mean taken per sample (DMD, arXiv 2311.18828, eq. 8)."""
    scale = (latents - real_x0).abs().mean(dim=tuple(range(1, latents.ndim)), keepdim=True)
    return (fake_x0 - real_x0) / scale


def surrogate_loss(latents: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """0.5 mean (x - sg(x - gradient))^2 in float64: its derivative is gradient / number of elements.

    mask: bool, shape of latents; False elements take no part.
    """
    x = latents.double()
    difference = x - (x - gradient.double()).detach()
    if mask is not None:
        difference = difference[mask]
    return 0.5 * difference.square().mean()


def dmd_loss(
    at: Compared,
    real: Score,
    fake: Score,
    *,
    real_guidance: float = 3.0,
    fake_guidance: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DMD loss of generated latents; gradients reach these only. mask: as in `surrogate_loss`."""
    with torch.no_grad():
        x_t = at.x_t
        fake_x0, real_x0 = at.predict_x0(fake, x_t, fake_guidance), at.predict_x0(real, x_t, real_guidance)
        gradient = distribution_gradient(at.latents, real_x0, fake_x0)
    return surrogate_loss(at.latents, gradient, mask)


def sid_loss(at: Compared, real: Score, fake: Score, *, real_guidance: float = 3.0, alpha: float = 1.0) -> Tensor:
    """Score identity distillation (arXiv 2404.04057): mean of (r - f) ((r - x) - alpha (r - f)) / sg(mean |x - r|).

    Gradients flow through x_t and both networks and reach the latents only. They are taken at once: the graphs of the
    scores are gone before that of the generator is needed.
    """

    def loss(latents: Tensor) -> Tensor:
        x_t = replace(at, latents=latents).x_t
        fake_x0, real_x0 = at.predict_x0(fake, x_t).double(), at.predict_x0(real, x_t, real_guidance).double()
        x, gap = latents.double(), real_x0 - fake_x0
        scale = (x - real_x0).detach().abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (gap * ((real_x0 - x) - alpha * gap) / scale).mean()

    return with_gradient(loss, at.latents)


def critic_loss(at: Compared, fake: Score) -> Tensor:
    """Flow matching of the fake score on generated latents: mean |v - (noise - x)|^2.

    Under two schedules the reference goes flow -> x0 by the score's and back by the generator's, which scales the flow.
    """
    at = replace(at, latents=at.latents.detach())
    flow = fake(at.x_t, at.timestep, True)
    if at.score_schedule is not None:
        ratio = at.score_schedule.sigma_at(at.timestep).double() / at.sigma.double()
        flow = flow * ratio.to(flow).view(-1, *[1] * (flow.ndim - 1))
    return (flow - (at.noise - at.latents)).square().mean()


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Settings of the comparison of scores.

    Args:
        real_guidance, fake_guidance: classifier-free weights minus one, added on top of the conditional prediction.
        shift: shift of the levels at which scores are compared.
        schedule_shift: shift of the score networks' own table, when it differs (Self-Forcing's released weights: 8),
            None for the generator's.
        low, high: timesteps are clamped to this range.
        sid_alpha: alpha of the SiD loss.
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


def make_context(clip: Tensor, chunk_frames: int, window: int | None) -> Context | None:
    """What a causal teacher sees beside the noisy clip, within `window` latent frames; None: a bidirectional one."""
    if window is None:
        return None
    chunks = [chunk_frames] * (clip.shape[1] // chunk_frames)
    return Context(clip.detach(), ParallelAttention.teacher_forcing(chunks, window=window))


def make_score(
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
