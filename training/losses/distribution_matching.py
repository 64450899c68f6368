"""Distribution matching: DMD and SiD generator losses and the critic's loss (Self-Forcing; DMD2, arXiv 2405.14867).

Everything is a pure function of latents at pipeline level [B, F, C, H, W], one timestep per sample, and score networks

    score(x_t, timestep, conditional) -> flow        conditional = False: the negative prompt

Guidance convention: `guidance` is added on top of the conditional prediction, r = c + g (c - u). The usual
classifier-free weight of u + w (c - u) is w = 1 + g; 0 is no guidance and spares the second pass.

Schedules: `schedule` adds the noise and `score_schedule` turns a score's flow into x0. Use one for both; Self-Forcing's
released weights were trained with shift 5 and shift 8 (a mismatch of up to 19 % at t = 20).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.model.eager_gradient import with_gradient
from sparse_forcing.model.flow import NUM_TRAIN_TIMESTEPS, FlowSchedule, add_noise, flow_to_x0, shift_sigma

Score = Callable[[Tensor, Tensor, bool], Tensor]


def score_timestep(raw: Tensor, *, shift: float = 5.0, low: float = 20.0, high: float = 980.0) -> Tensor:
    """Timesteps [B] of uniform draws `raw` [B] in [0, 1000): shifted towards noise, then clamped to [low, high]."""
    return (NUM_TRAIN_TIMESTEPS * shift_sigma(raw / NUM_TRAIN_TIMESTEPS, shift)).clamp(low, high)


@dataclass(frozen=True)
class Perturbed:
    """Latents moved to the noise level at which scores are compared: x_t [B, F, C, H, W], timestep and sigma [B]."""

    x_t: Tensor
    timestep: Tensor
    sigma: Tensor


def perturb(latents: Tensor, noise: Tensor, timestep: Tensor, schedule: FlowSchedule) -> Perturbed:
    """Add `noise` to `latents` at `timestep` [B]."""
    sigma = schedule.sigma_at(timestep)
    return Perturbed(add_noise(latents, noise, sigma), timestep, sigma)


def predict_x0(score: Score, at: Perturbed, schedule: FlowSchedule, guidance: float = 0.0) -> Tensor:
    """The score's clean prediction, guided: c + guidance (c - u)."""
    sigma = schedule.sigma_at(at.timestep)
    cond = flow_to_x0(score(at.x_t, at.timestep, True), at.x_t, sigma)
    if guidance == 0:
        return cond
    return cond + guidance * (cond - flow_to_x0(score(at.x_t, at.timestep, False), at.x_t, sigma))


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
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    real: Score,
    fake: Score,
    *,
    schedule: FlowSchedule,
    score_schedule: FlowSchedule | None = None,
    real_guidance: float = 3.0,
    fake_guidance: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DMD loss of generated latents; gradients reach `latents` only."""
    score_schedule = score_schedule or schedule
    with torch.no_grad():
        at = perturb(latents, noise, timestep, schedule)
        fake_x0 = predict_x0(fake, at, score_schedule, fake_guidance)
        real_x0 = predict_x0(real, at, score_schedule, real_guidance)
        gradient = distribution_gradient(latents, real_x0, fake_x0)
    return surrogate_loss(latents, gradient, mask)


def sid_loss(
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    real: Score,
    fake: Score,
    *,
    schedule: FlowSchedule,
    score_schedule: FlowSchedule | None = None,
    real_guidance: float = 3.0,
    alpha: float = 1.0,
) -> Tensor:
    """Score identity distillation (arXiv 2404.04057): mean of (r - f) ((r - x) - alpha (r - f)) / sg(mean |x - r|).

    Gradients flow through x_t and both networks and reach `latents` only. They are taken at once: the graphs of the
    scores are gone before that of the generator is needed.
    """

    def loss(latents: Tensor) -> Tensor:
        at = perturb(latents, noise, timestep, schedule)
        fake_x0 = predict_x0(fake, at, score_schedule or schedule).double()
        real_x0 = predict_x0(real, at, score_schedule or schedule, real_guidance).double()
        x, gap = latents.double(), real_x0 - fake_x0
        scale = (x - real_x0).detach().abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (gap * ((real_x0 - x) - alpha * gap) / scale).mean()

    return with_gradient(loss, latents)


def critic_loss(
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    fake: Score,
    *,
    schedule: FlowSchedule,
    score_schedule: FlowSchedule | None = None,
) -> Tensor:
    """Flow matching of the fake score on generated latents: mean |v - (noise - x)|^2.

    Under two schedules the reference goes flow -> x0 by the score's and back by the generator's, which scales the flow.
    """
    latents = latents.detach()
    at = perturb(latents, noise, timestep, schedule)
    flow = fake(at.x_t, timestep, True)
    if score_schedule is not None:
        ratio = score_schedule.sigma_at(timestep).double() / at.sigma.double()
        flow = flow * ratio.to(flow).view(-1, *[1] * (flow.ndim - 1))
    return (flow - (noise - latents)).square().mean()
