"""Noise levels of a sampler, apart from the sampler itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.flow import NUM_TRAIN_TIMESTEPS, FlowSchedule, shift_sigma

SAMPLERS = ("few_step", "euler", "unipc", "wan_unipc")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a chunk is denoised.

    Args:
        kind: few_step (Self-Forcing: predict x0, add fresh noise at the next level), euler, unipc (diffusers'
            grid), or wan_unipc (the grid of Wan's and Self-Forcing's own code, which starts just below 1).
        steps: network evaluations per chunk (two per step with guidance).
        shift: of the noise grid.
        step_list: few_step only: unshifted timesteps, e.g. 1000, 750, 500, 250; evenly spaced when None.
        guidance_scale: w of uncond + w (cond - uncond); 1 for none.
    """

    kind: str = "few_step"
    steps: int = 4
    shift: float = 5.0
    step_list: tuple[int, ...] | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ConfigError(f"sampler.kind: expected one of {', '.join(SAMPLERS)}, got {self.kind!r}")
        if not 1 <= self.steps <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"num_inference_steps: expected 1 to {NUM_TRAIN_TIMESTEPS}, got {self.steps}")
        if self.step_list is not None and len(self.step_list) != self.steps:
            raise ConfigError(f"sampler.step_list: {len(self.step_list)} entries for {self.steps} steps")
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(f"guidance_scale: a finite number that is not negative, got {self.guidance_scale}")


def few_step_timesteps(config: SamplerConfig) -> Tensor:
    """[steps] timesteps of the few-step list, warped by the shifted grid."""
    steps = config.step_list
    if steps is None:
        steps = tuple(round(NUM_TRAIN_TIMESTEPS * (config.steps - i) / config.steps) for i in range(config.steps))
    return FlowSchedule(config.shift).warp(list(steps))


def euler_sigmas(config: SamplerConfig) -> Tensor:
    """[steps + 1] sigmas from 1 to 0, uniform before the shift."""
    return shift_sigma(torch.linspace(1, 0, config.steps + 1), config.shift)


def wan_levels(steps: int) -> list[float]:
    """[steps] uniform noise levels of Wan's own UniPC, before the shift: from 0.999 towards 0."""
    return torch.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
