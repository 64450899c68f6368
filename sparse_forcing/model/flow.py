"""Flow matching: paths, conversions, the shifted grid of Self-Forcing and Wan, and the noise levels of samplers.

x_t = (1 - sigma) x0 + sigma noise;  v = noise - x0;  x0 = x_t - sigma v.  Timesteps are 1000 sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000
SAMPLERS = ("few_step", "euler", "diffusers_euler", "unipc", "wan_unipc")
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": NUM_TRAIN_TIMESTEPS}
"""What UniPC is told beside its shift; all else is as diffusers has it."""


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """sigma = shift u / (1 + (shift - 1) u): moves a uniform grid towards the noisy end."""
    return shift * u / (1 + (shift - 1) * u)


def _broadcast(sigma: Tensor, x: Tensor) -> Tensor:
    """[B] or [B, F] -> shape that broadcasts with x [B, F, ...]."""
    return sigma.reshape(*sigma.shape, *([1] * (x.ndim - sigma.ndim)))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of the path; sigma [B] or [B, F] against x0 [B, F, ...]."""
    s = _broadcast(sigma, x0)
    return ((1 - s) * x0 + s * noise).to(x0.dtype)


def flow_to_x0(flow: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma v, in float64 as the reference does, back in flow's dtype."""
    return (x_t.double() - _broadcast(sigma, x_t).double() * flow.double()).to(flow.dtype)


class FlowSchedule:
    """Self-Forcing's table of 1000 shifted sigmas (sigma_min 0, the final zero left out).

    Args:
        shift: 5 for Self-Forcing's generator, 8 for its score networks, 1 for no shift.
    """

    def __init__(self, shift: float = 5.0) -> None:
        if not shift > 0:
            raise ConfigError(f"shift: must be positive, got {shift}")
        self.shift = float(shift)

    @cached_property
    def sigmas(self) -> Tensor:
        """[1000] descending from 1."""
        return shift_sigma(torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1], self.shift)

    @cached_property
    def timesteps(self) -> Tensor:
        """[1000] = 1000 sigma."""
        return self.sigmas * NUM_TRAIN_TIMESTEPS

    @cached_property
    def training_weights(self) -> Tensor:
        """[1000] bell around t = 500, least value moved to zero, mean 1."""
        y = torch.exp(-2 * ((self.timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
        y = y - y.min()
        return y * NUM_TRAIN_TIMESTEPS / y.sum()

    def find_index(self, timestep: Tensor) -> Tensor:
        """Nearest entry of the grid for each timestep."""
        grid = self.timesteps.to(timestep.device)
        return (grid - timestep[..., None].to(grid.dtype)).abs().argmin(-1)

    def sigma_at(self, timestep: Tensor) -> Tensor:
        """sigma of the nearest grid entry (t = 0 gives the last sigma, not 0, as in the reference)."""
        return self.sigmas.to(timestep.device)[self.find_index(timestep)]

    def training_weight_at(self, timestep: Tensor) -> Tensor:
        """Self-Forcing's weight of a training loss at these timesteps, of the same shape."""
        return self.training_weights.to(timestep.device)[self.find_index(timestep)]

    def warp(self, steps: list[int] | Tensor) -> Tensor:
        """Timesteps of a few-step list: entry 1000 - step of the grid followed by 0."""
        grid = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return grid[NUM_TRAIN_TIMESTEPS - torch.as_tensor(steps, dtype=torch.long)]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a chunk is denoised.

    Args:
        kind: few_step (Self-Forcing: predict x0, add fresh noise at the next level), euler (even before the shift),
            diffusers_euler and unipc (diffusers' grids), or wan_unipc (the grid of Wan's and Self-Forcing's own code,
            which starts just below 1).
        steps: network evaluations per chunk (two per step with guidance).
        shift: the noise grid's shift towards high noise.
        step_list: few_step only: unshifted timesteps, e.g. 1000, 750, 500, 250; evenly spaced when None.
        warp_steps: few_step only: whether the shift applies to `step_list`; False: it holds the timesteps themselves
            (CausVid's).
        guidance_scale: w of uncond + w (cond - uncond); 1 for none.
    """

    kind: str = "few_step"
    steps: int = 4
    shift: float = 5.0
    step_list: tuple[int, ...] | None = None
    warp_steps: bool = True
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ConfigError(f"sampler.kind: expected one of {', '.join(SAMPLERS)}, got {self.kind!r}")
        if not 1 <= self.steps <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"num_inference_steps: expected 1 to {NUM_TRAIN_TIMESTEPS}, got {self.steps}")
        if self.step_list is not None and len(self.step_list) != self.steps:
            raise ConfigError(f"sampler.step_list: {len(self.step_list)} entries for {self.steps} steps")
        if self.step_list is not None and not all(0 < step <= NUM_TRAIN_TIMESTEPS for step in self.step_list):
            raise ConfigError(f"sampler.step_list: entries from 1 to {NUM_TRAIN_TIMESTEPS}, got {self.step_list}")
        if not 0 < self.shift < math.inf:
            raise ConfigError(f"sampler.shift: a finite number above 0, got {self.shift}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(f"guidance_scale: a finite number that is not negative, got {self.guidance_scale}")


def few_step_timesteps(config: SamplerConfig) -> Tensor:
    """[steps] timesteps of the few-step list, warped by the shifted grid unless they are meant as they are."""
    steps = config.step_list
    if steps is None:
        steps = tuple(round(NUM_TRAIN_TIMESTEPS * (config.steps - i) / config.steps) for i in range(config.steps))
    if not config.warp_steps:
        return torch.tensor(steps, dtype=torch.float32)
    return FlowSchedule(config.shift).warp(list(steps))


def euler_sigmas(config: SamplerConfig) -> Tensor:
    """[steps + 1] sigmas from 1 to 0, uniform before the shift; of `diffusers_euler` those of diffusers'
    FlowMatchEulerDiscreteScheduler, whose last level above 0 is the shifted least one of its table, shifted again."""
    if config.kind == "diffusers_euler":
        least = shift_sigma(torch.tensor(1 / NUM_TRAIN_TIMESTEPS), config.shift).item()
        return torch.cat([shift_sigma(torch.linspace(1, least, config.steps), config.shift), torch.zeros(1)])
    return shift_sigma(torch.linspace(1, 0, config.steps + 1), config.shift)


def wan_levels(steps: int) -> list[float]:
    """[steps] uniform noise levels of Wan's own UniPC, before the shift: from 0.999 towards 0."""
    return torch.linspace(1 - 1 / NUM_TRAIN_TIMESTEPS, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
