"""Samplers of one chunk as pure functions of a flow network: `sample_x(flow, x, schedule, ...)`.

`flow(x, timestep, step)` returns v for x [B, f, C, H, W] at a scalar timestep in [0, 1000]. After every step
`after(step, timestep, x)` gets what it led to; what it returns is gone on from, and whether to go on at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_forcing.model.flow import (
    NUM_TRAIN_TIMESTEPS,
    UNIPC,
    FlowSchedule,
    SamplerConfig,
    add_noise,
    euler_sigmas,
    few_step_timesteps,
    flow_to_x0,
    wan_levels,
)

Flow = Callable[[Tensor, Tensor, int], Tensor]
StepHook = Callable[[int, Tensor, Tensor], tuple[Tensor, bool]]


def go_on(step: int, timestep: Tensor, x: Tensor) -> tuple[Tensor, bool]:
    """The step hook that changes nothing."""
    return x, True


def sample_few_step(
    flow: Flow,
    x: Tensor,
    timesteps: Tensor,
    sigmas: Tensor,
    fresh_noise: Callable[[], Tensor],
    exit_step: int | None = None,
    after: StepHook = go_on,
) -> Tensor:
    """Self-Forcing's consistency sampler: x0 at every level, re-noised to the next with fresh noise.

    Args:
        timesteps, sigmas: [steps] descending, where x is.
        exit_step: stop after this step and return its x0 (training); the last one when None.
    """
    last = len(timesteps) - 1 if exit_step is None else exit_step
    batch = len(x)
    for step in range(last + 1):
        x = flow_to_x0(flow(x, timesteps[step], step), x, sigmas[step].expand(batch))
        if step < last:
            x = add_noise(x, fresh_noise(), sigmas[step + 1].expand(batch))
        x, going = after(step, timesteps[step], x)
        if not going:
            break
    return x


def sample_euler(flow: Flow, x: Tensor, sigmas: Tensor, after: StepHook = go_on) -> Tensor:
    """Euler steps of dx/dsigma = v from sigmas[0] to sigmas[-1]."""
    for step, (sigma, following) in enumerate(pairwise(sigmas.to(x.device))):
        timestep = sigma * NUM_TRAIN_TIMESTEPS
        x, going = after(step, timestep, x + flow(x, timestep, step) * (following - sigma).to(x.dtype))
        if not going:
            break
    return x


def sample_scheduler(flow: Flow, x: Tensor, scheduler: Any, after: StepHook = go_on) -> Tensor:
    """The steps of a diffusers scheduler whose timesteps are set, and which predicts flows."""
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(flow(x, timestep.float(), step), timestep, x, return_dict=False)[0]
        x, going = after(step, timestep, x)
        if not going:
            break
    return x


def sample_unipc(
    flow: Flow, x: Tensor, steps: int, shift: float, levels: Sequence[float] | None = None, after: StepHook = go_on
) -> Tensor:
    """diffusers' UniPC in flow mode, as Wan samples.

    Args:
        levels: [steps] noise levels before the shift; diffusers' own, which start at 1, when None.
    """
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(**UNIPC, flow_shift=shift)
    if levels is None:
        scheduler.set_timesteps(steps, device=x.device)
    else:
        scheduler.set_timesteps(device=x.device, sigmas=np.asarray(levels))
    return sample_scheduler(flow, x, scheduler, after)


@lru_cache(maxsize=16)
def few_step_levels(config: SamplerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """[steps] timesteps and sigmas of the few-step list; remembered, because bringing them to a GPU waits for it."""
    timesteps = few_step_timesteps(config)
    return timesteps.to(device), FlowSchedule(config.shift).sigma_at(timesteps).to(device)


@lru_cache(maxsize=16)
def euler_levels(config: SamplerConfig, device: torch.device) -> Tensor:
    """[steps + 1] sigmas on the device, remembered likewise."""
    return euler_sigmas(config).to(device)


def sample_chunk(
    config: SamplerConfig,
    flow: Flow,
    x: Tensor,
    fresh_noise: Callable[[], Tensor],
    exit_step: int | None = None,
    after: StepHook = go_on,
    scheduler: Any = None,
) -> Tensor:
    """Denoise one chunk of noise x [B, f, C, H, W] with the configured sampler, or as many steps of a diffusers
    scheduler."""
    if scheduler is not None:
        own = copy.deepcopy(scheduler)  # it keeps the state of one chunk
        own.set_timesteps(config.steps, device=x.device)
        return sample_scheduler(flow, x, own, after)
    if config.kind == "few_step":
        return sample_few_step(flow, x, *few_step_levels(config, x.device), fresh_noise, exit_step, after)
    if config.kind in ("euler", "diffusers_euler"):
        return sample_euler(flow, x, euler_levels(config, x.device), after)
    levels = wan_levels(config.steps) if config.kind == "wan_unipc" else None
    return sample_unipc(flow, x, config.steps, config.shift, levels, after)


def guide(flow: Tensor, guidance_scale: float) -> Tensor:
    """uncond + w (cond - uncond) of a doubled batch [cond | uncond]."""
    cond, uncond = flow.chunk(2)
    return torch.lerp(uncond, cond, guidance_scale)
