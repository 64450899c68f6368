"""Losses that count equally at every noise level, whatever the error that is left there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_forcing.training.losses.flow_matching import sigma_quantile


class LevelBalance(nn.Module):
    """Divides errors by the running mean of their noise level.

    Near pure noise most of the error can never be learned away (the prompt does not say where an object is); it
    would drown the levels at which shapes form. EDM2 (arXiv 2312.02696) learns such a weight as an uncertainty; here it
    is a table over quantiles of the levels, one row per kind of task.

    Args:
        kinds: tasks with errors of their own.
        shift, spread: shift and spread of the distribution that levels are drawn from (`sample_sigma`).
        bins: noise levels that are told apart, of equal probability.
    """

    SLOWEST = 0.02
    """Share of a new mean in the running one, once enough were seen."""

    def __init__(self, kinds: int, *, shift: float, spread: float, bins: int = 16) -> None:
        super().__init__()
        self.shift, self.spread, self.bins = shift, spread, bins
        self.mean: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.ones(kinds, bins))
        self.register_buffer("seen", torch.zeros(kinds, bins))

    def forward(self, error: Tensor, sigma: Tensor, kind: int) -> Tensor:
        """Mean of error / (mean error at its level), both [B, F]; about 1 however good the model is."""
        quantile = sigma_quantile(sigma, shift=self.shift, spread=self.spread).flatten()
        level = (quantile * self.bins).long().clamp(0, self.bins - 1)
        self._follow(error.detach().flatten(), level, kind)
        return (error.flatten() / self.mean[kind, level]).mean()

    @torch.no_grad()
    def _follow(self, error: Tensor, level: Tensor, kind: int) -> None:
        total, count = (
            torch.zeros_like(self.mean[kind]).index_add_(0, level, v) for v in (error, error.new_ones(len(error)))
        )
        found = count > 0
        self.seen[kind] += found
        rate = (1 / self.seen[kind].clamp(min=1)).clamp(min=self.SLOWEST)
        moved = torch.lerp(self.mean[kind], total / count.clamp(min=1), rate)
        self.mean[kind] = torch.where(found, moved, self.mean[kind])
