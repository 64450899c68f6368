"""Training losses as pure functions. Legend: B batch, C channels, F latent frames; latents [B, C, F, H, W]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_forcing.model.flow import FlowSchedule, add_noise, flow_to_x0, shift_sigma


def sample_sigma(batch: int, groups: int, *, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """[B, G] noise levels: logit-normal with standard deviation `spread`, then shifted towards noise.

    Stratified: the draws of a batch fill the distribution's quantiles evenly, which makes the loss less noisy.
    """
    count = batch * groups
    quantile = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    u = torch.sigmoid(torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6)) * spread)
    return shift_sigma(u, shift).view(batch, groups)


def sigma_quantile(sigma: Tensor, *, shift: float, spread: float) -> Tensor:
    """The share of `sample_sigma`'s levels that are below sigma."""
    return torch.special.ndtr(torch.logit(shift_sigma(sigma, 1 / shift)) / spread)


def unit_variance_weight(sigma: Tensor, latent_std: list[float] | None) -> Tensor | float:
    """Weight of the squared flow error that makes it the squared error of the preconditioned network output:
    (1 - sigma)^2 + sigma^2 / s^2 per channel of standard deviation s. sigma [B, F] -> [B, C, F, 1, 1].
    """
    if latent_std is None:
        return 1.0
    s = torch.tensor(latent_std, dtype=sigma.dtype, device=sigma.device)[:, None, None, None]
    t = sigma[:, None, :, None, None]
    return (1 - t) ** 2 + t**2 / s**2


def noisy_latents(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of model-level latents [B, C, F, H, W] with one sigma per frame [B, F]."""
    return add_noise(latents.transpose(1, 2), noise.transpose(1, 2), sigma).transpose(1, 2)


def flow_matching_error(flow: Tensor, latents: Tensor, noise: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """weight * |v - (noise - x0)|^2, mean per frame: [B, C, F, H, W] -> [B, F]."""
    return (weight * (flow.float() - (noise - latents)) ** 2).mean((1, 3, 4))


def per_chunk(draws: Tensor, chunks: list[int]) -> Tensor:
    """[B, F] draws -> [B, F] where every frame of a chunk takes the draw of the chunk's first frame."""
    starts = torch.tensor(chunks).cumsum(0) - torch.tensor(chunks)
    return draws[:, starts].repeat_interleave(torch.tensor(chunks, device=draws.device), 1)


def scheduled_flow_loss(flow: Tensor, target: Tensor, timestep: Tensor, schedule: FlowSchedule) -> Tensor:
    """Teacher- and diffusion-forcing loss: error against the target flow by the schedule's training weight, in float32.

    Args:
        flow, target: [B, F, C, H, W]; timestep: [B, F], constant inside a chunk.
    """
    error = (flow.float() - target.float()).square().flatten(2).mean(-1)
    return (error * schedule.training_weight_at(timestep)).mean()


def ode_inputs(trajectory: Tensor, index: Tensor) -> Tensor:
    """Pick per frame a state of the teacher's trajectory: [B, S, F, C, H, W] at [B, F] -> [B, F, C, H, W]."""
    where = index[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
    return trajectory.gather(1, where).squeeze(1)


def ode_regression_loss(flow: Tensor, x_t: Tensor, x0: Tensor, timestep: Tensor, schedule: FlowSchedule) -> Tensor:
    """Mean squared error of the student's x0 against the teacher's end point, over frames that carry noise.

    Args:
        flow, x_t, x0: [B, F, C, H, W]; timestep: [B, F], 0 for frames that are already clean.
    """
    prediction = flow_to_x0(flow, x_t, schedule.sigma_at(timestep))
    return (prediction - x0).square()[timestep != 0].mean()


def consistency_target(
    teacher: Callable[[Tensor, Tensor], Tensor],
    average: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    sigma: Tensor,
    following: Tensor,
) -> Tensor:
    """x0 that `average` predicts where one Euler step of the teacher from sigma to `following` leads; where that is 0,
    it is the x0 (consistency distillation, arXiv 2303.01469, section 4).

    Args:
        teacher, average: flow of x [B, F, C, H, W] at noise levels [B, F].
        sigma, following: [B, F], following < sigma.
    """
    x = flow_to_x0(teacher(x_t, sigma).float(), x_t, sigma - following)  # the same line, left before its end
    return flow_to_x0(average(x, following).float(), x, following)
