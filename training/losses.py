"""Training losses as pure functions. Legend: B batch, C channels, F latent frames; latents [B, C, F, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.flow import add_noise, shift_sigma


def sample_sigma(batch: int, groups: int, *, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """[B, G] noise levels: logit-normal with standard deviation `spread`, then shifted towards noise."""
    u = torch.sigmoid(torch.randn(batch, groups, generator=generator) * spread)
    return shift_sigma(u, shift)


def unit_variance_weight(sigma: Tensor, latent_std: list[float] | None) -> Tensor | float:
    """Weight of the squared flow error that makes it the squared error of the preconditioned network output:
    (1 - sigma)^2 + sigma^2 / s^2 per channel of standard deviation s. sigma [B, F] -> [B, C, F, 1, 1]."""
    if latent_std is None:
        return 1.0
    s = torch.tensor(latent_std, dtype=sigma.dtype)[:, None, None, None]
    t = sigma[:, None, :, None, None]
    return ((1 - t) * s) ** 2 / s**2 + t**2 / s**2


def noisy_latents(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of model-level latents [B, C, F, H, W] with one sigma per frame [B, F]."""
    return add_noise(latents.transpose(1, 2), noise.transpose(1, 2), sigma).transpose(1, 2)


def flow_matching_loss(flow: Tensor, latents: Tensor, noise: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """mean(weight * |v - (noise - x0)|^2)."""
    return (weight * (flow.float() - (noise - latents)) ** 2).mean()
